// Colours and dashes of arms: six hues, then dashes.
import { computed } from "@preact/signals";
import { theme } from "./view";

const HUES = 6;
const DASHES: number[][] = [[], [7, 3], [2, 2], [9, 2, 2, 2]];

/** FNV-1a. */
function hash(text: string): number {
  let value = 0x811c9dc5;
  for (let i = 0; i < text.length; i++) value = Math.imul(value ^ text.charCodeAt(i), 0x01000193);
  return value >>> 0;
}

/** The slot of each name: by the name alone, but where two share a hue the later takes the next that is free. */
export function slotsOf(names: string[]): Map<string, number> {
  const slots = new Map<string, number>();
  [...new Set(names)].sort().forEach((name, i) => {
    const round = Math.floor(i / HUES) * HUES;
    const taken = new Set(slots.values());
    let slot = round + (hash(name) % HUES);
    while (taken.has(slot)) slot = round + ((slot + 1 - round) % HUES);
    slots.set(name, slot);
  });
  return slots;
}

export const hueOf = (slot: number) => slot % HUES;
export const dashOf = (slot: number) => DASHES[Math.floor(slot / HUES) % DASHES.length]!;

/** The style sheet's colours as a canvas takes them. */
export const canvasColours = computed(() => {
  document.documentElement.dataset.theme = theme.value;
  const probe = document.body.appendChild(document.createElement("i"));
  const of = (name: string) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
  const colours = {
    hues: Array.from({ length: HUES }, (_, i) => of(`hue-${i}`)),
    text: of("muted"),
    grid: of("grid"),
    axis: of("border"),
    card: of("card"),
  };
  probe.remove();
  return colours;
});
