// One connection for all that the page follows; it resumes by frame numbers, and polls where WebSocket is refused.
import { signal } from "@preact/signals";
import { type Columns, decodeColumns, poll, token } from "./api";

export const connection = signal<"connecting" | "live" | "polling" | "lost">("connecting");

interface Topic {
  frame: number | null;
  receive: (columns: Columns) => void;
}

const RETRY_MS = [300, 1_000, 2_000, 4_000, 8_000];
const POLL_MS = 1_500;
const REFUSALS_BEFORE_POLLING = 2;
const HIDDEN_MS = 60_000;
/** Close code for a message that the server does not take: it will not take it again either. */
const REFUSED_MESSAGE = 1008;
const REFUSED_MS = 30_000;

const topics = new Map<string, Topic>();
let socket: WebSocket | null = null;
let failures = 0;
let refusals = 0; // handshakes in a row that never opened
let sending = 0;
let polling: AbortController | null = null;

/** Follow a topic from a frame on. Returns what ends it. */
export function subscribe(topic: string, frame: number | null, receive: (columns: Columns) => void): () => void {
  const entry = { frame, receive };
  topics.set(topic, entry);
  sendSoon();
  return () => {
    if (topics.get(topic) !== entry) return;
    topics.delete(topic);
    sendSoon();
  };
}

const subscriptions = () => [...topics].map(([topic, { frame }]) => ({ topic, frame }));

function sendSoon(): void {
  if (!sending) sending = window.setTimeout(send, 20);
}

function send(): void {
  sending = 0;
  if (socket?.readyState === WebSocket.OPEN) socket.send(JSON.stringify({ subscribe: subscriptions() }));
  else if (!socket && !polling && topics.size) connect();
}

function dispatch(buffer: ArrayBuffer): void {
  const columns = decodeColumns(buffer);
  const topic = topics.get(columns.header.topic);
  if (!topic) return;
  topic.frame = columns.header.frame;
  topic.receive(columns);
}

function connect(): void {
  const url = location.origin.replace(/^http/, "ws") + "/api/live";
  const opened = new WebSocket(url, ["evsys", `token.${token}`]);
  let wasOpen = false;
  opened.binaryType = "arraybuffer";
  socket = opened;
  opened.onopen = () => {
    wasOpen = true;
    failures = refusals = 0;
    connection.value = "live";
    send();
  };
  opened.onmessage = (message) => dispatch(message.data);
  opened.onclose = ({ code }) => {
    if (socket !== opened) return;
    socket = null;
    if (code === REFUSED_MESSAGE) {
      connection.value = "lost";
      setTimeout(connect, REFUSED_MS);
      return;
    }
    if (!wasOpen) refusals++;
    if (refusals >= REFUSALS_BEFORE_POLLING) {
      refusals = 0;
      void pollForAMinute();
      return;
    }
    connection.value = "lost";
    setTimeout(connect, RETRY_MS[Math.min(failures++, RETRY_MS.length - 1)]);
  };
}

/** Poll for a minute, then try WebSocket again: what refused it may have been a server on its way up. */
async function pollForAMinute(): Promise<void> {
  polling = new AbortController();
  const end = Date.now() + 60_000;
  let pause = POLL_MS;
  while (Date.now() < end) {
    try {
      for (const frame of await poll(subscriptions(), polling.signal)) dispatch(frame);
      connection.value = "polling";
      pause = POLL_MS;
    } catch {
      connection.value = "lost";
      pause = Math.min(2 * pause, 8_000);
    }
    await new Promise((resolve) => setTimeout(resolve, pause));
    if (connection.value === "lost") break; // the server is away: WebSocket finds it as well when it is back
  }
  polling = null;
  connect();
}

// A laptop that slept holds a connection that no longer exists.
let hiddenSince = 0;
document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    hiddenSince = Date.now();
  } else if (socket?.readyState === WebSocket.OPEN && Date.now() - hiddenSince > HIDDEN_MS) {
    socket.close();
  }
});
