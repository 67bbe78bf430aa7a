// The server's events: what the engine is, and what it does now.

const RETRY_MS = 3000;

/**
 * Watches the engine while the page is visible.
 *
 * onModel and onState get the data of the events; onConnection gets "waiting", "live" or "lost".
 */
export function watch({ onModel, onState, onConnection }) {
  let source = null;
  let retry = 0;

  function open() {
    clearTimeout(retry);
    if (source || document.hidden) return;
    source = new EventSource("page/events");
    source.addEventListener("open", () => onConnection("live"));
    source.addEventListener("model", (event) => onModel(JSON.parse(event.data)));
    source.addEventListener("state", (event) => onState(JSON.parse(event.data)));
    source.addEventListener("error", () => {
      onConnection("lost");
      if (source.readyState === EventSource.CLOSED) {
        // The browser tries again by itself after a broken connection, and not after a refusal.
        close();
        retry = setTimeout(open, RETRY_MS);
      }
    });
  }

  function close() {
    source?.close();
    source = null;
  }

  document.addEventListener("visibilitychange", () => {
    if (document.hidden) close();
    else open();
  });
  addEventListener("pagehide", close);
  onConnection("waiting");
  open();
}
