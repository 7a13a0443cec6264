// Bundles the page: `node build.mjs FOLDER` writes index.html and assets/ with a hash in each name into FOLDER.
import { build } from "esbuild";
import { readFile, writeFile } from "node:fs/promises";
import { basename, join } from "node:path";

const folder = process.argv[2];
if (!folder) throw new Error("usage: node build.mjs FOLDER");

const { metafile } = await build({
  entryPoints: { app: "src/main.tsx" },
  outdir: join(folder, "assets"),
  entryNames: "[name]-[hash]",
  bundle: true,
  minify: true,
  format: "esm",
  target: "es2022",
  jsx: "automatic",
  jsxImportSource: "preact",
  legalComments: "eof", // the licences of what is bundled ask for their notice
  metafile: true,
  logLevel: "warning",
});

const outputs = Object.keys(metafile.outputs).map((path) => basename(path));
const script = outputs.find((name) => name.endsWith(".js"));
const style = outputs.find((name) => name.endsWith(".css"));
const template = await readFile("src/index.html", "utf8");
await writeFile(
  join(folder, "index.html"),
  template.replace("app.js", script).replace("app.css", style),
);
