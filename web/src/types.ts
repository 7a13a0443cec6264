// The JSON of the server, as the page reads it.

export type State = "pending" | "running" | "completed" | "failed" | "cancelled" | "stopped" | "stalled";
/** What can be known of the upload of a checkpoint, and the state that is like it. */
export const UPLOADS = { uploading: "running", uploaded: "completed", conflict: "failed", removed: "cancelled" } as const;
export type Direction = "min" | "max" | null;

export interface ExperimentRow {
  id: string;
  name: string;
  state: State;
  hypothesis: string | null;
  tags: string[];
  arms: number;
  runs: Partial<Record<"total" | "planned" | State, number>>;
  headline: {
    name: string;
    direction: Direction;
    value: number | null;
    arm: string | null;
    spark: (number | null)[];
    /** The metric of the curve, which may be another one than the value's. */
    spark_name?: string;
  } | null;
  started: number | null;
  ended: number | null;
  last_event: number | null;
  progress: number | null;
}

export interface Home {
  store: string;
  now: number;
  frame?: number;
  experiments: ExperimentRow[];
}

export interface Headline {
  name: string;
  direction: Direction;
  rule: string;
}

export interface ArmValue {
  mean: number | null;
  sd: number | null;
  n: number;
  delta: number | null;
  delta_sd: number | null;
  points: (number | null)[];
}

export interface Arm {
  name: string;
  state: State;
  runs: string[];
  n: number;
  values: (ArmValue | null)[];
  winner: boolean;
}

interface RunState {
  id: string;
  seed: number | null;
  state: State;
  error: string | null;
  step: number | null;
  num_steps: number | null;
  unit: string | null;
  started: number | null;
  ended: number | null;
  last_event: number | null;
}

/** A run in the list of an experiment. */
export interface Run extends RunState {
  name: string | null;
  arm: string | null;
  rank: number | null;
  values: (number | null)[];
  checkpoints: number;
  config: Record<string, unknown>;
}

/** A run on its own page, and where several are compared. */
export interface RunHead extends RunState {
  name: string;
  experiment: { id: string; name: string };
  arm: string;
  seconds: number | null;
}

export interface Metric {
  name: string;
  runs: number;
  points: number;
  constant: number | null;
  section: string | null;
  direction: Direction;
}

export interface Alert {
  run: string | null;
  title: string;
  text: string | null;
  level: string | null;
  time: number | null;
}

export interface Experiment {
  id: string;
  name: string;
  state: State;
  hypothesis: string | null;
  conclusion: string | null;
  tags: string[];
  notes: string | null;
  started: number | null;
  ended: number | null;
  last_event: number | null;
  progress: number | null;
  error: string | null;
  baseline: string | null;
  headlines: Headline[];
  arms: Arm[];
  runs: Run[];
  metrics: Metric[];
  same: Record<string, unknown>;
  /** What couriers have reported last of each adapter. */
  deliveries: { adapter: string; journal: string; pending?: number; dead?: number; error?: string | null; fix?: string | null }[];
  /** How far the best arm is ahead of the second one, which may be a better one that is incomplete. */
  lead?: { arm: string; second: string; metric: string; delta: number | null; delta_sd: number | null } | null;
  alerts: Alert[];
  now?: number;
  frame?: number;
}

export type Lines = "band" | "members" | "both";
export type XAxis = "step" | "relative" | "wall";

/** One curve: of an arm (band: over its seeds) or of a run (member). All columns are as long as x; NaN is a gap. */
export interface Line {
  kind: "band" | "member";
  arm: string;
  run: string | null;
  seed: number | null;
  n: number;
  points: number;
  bad: number;
  x: Float64Array;
  mean: Float64Array;
  min: Float64Array | null;
  max: Float64Array | null;
  sd: Float64Array | null;
  badAt: Float64Array;
  /** Where x is a time: the steps. */
  steps: Float64Array | null;
}

export interface Chart {
  metric: string;
  /** Steps in a bucket; 1: points as they were logged. */
  width: number;
  /** Points that the server has stored, in view or not. */
  total: number;
  lines: Line[];
}
