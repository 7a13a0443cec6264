// Bundles the page: `node build.mjs FOLDER` writes index.html and assets/ with a hash in each name into FOLDER.
// Pages that few readers open are files of their own, which the first view does not load.
import { build } from "esbuild";
import { readFile, writeFile } from "node:fs/promises";
import { basename, join } from "node:path";

const folder = process.argv[2];
if (!folder) throw new Error("usage: node build.mjs FOLDER");

const { metafile } = await build({
  entryPoints: { app: "src/main.tsx" },
  outdir: join(folder, "assets"),
  entryNames: "[name]-[hash]",
  chunkNames: "[name]-[hash]",
  bundle: true,
  splitting: true,
  minify: true,
  format: "esm",
  target: "es2022",
  jsx: "automatic",
  jsxImportSource: "preact",
  legalComments: "eof", // the licences of what is bundled ask for their notice
  metafile: true,
  logLevel: "warning",
});

const [[script, { imports, cssBundle }]] = Object.entries(metafile.outputs).filter(([, { entryPoint }]) => entryPoint === "src/main.tsx");
// What the script imports is loaded at the same time as the script, not after it.
const shared = imports.filter(({ kind }) => kind === "import-statement").map(({ path }) => basename(path));
const preloads = shared.map((name) => `<link rel="modulepreload" href="/assets/${name}">\n    `).join("");
const template = await readFile("src/index.html", "utf8");
await writeFile(
  join(folder, "index.html"),
  template
    .replace('<script type="module" src="/assets/app.js">', `${preloads}<script type="module" src="/assets/${basename(script)}">`)
    .replace("app.css", basename(cssBundle)),
);
