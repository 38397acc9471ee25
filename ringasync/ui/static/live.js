"use strict";
// Fetches the live part again and again. What comes is this server's own markup, in which all text
// from outside was escaped; the page's policy lets no script run but this file.
const EVERY_MS = 2000;
const PATIENCE_MS = 10000;

async function refresh() {
  const away = document.getElementById("away");
  try {
    const answer = await fetch("/now", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
    if (!answer.ok) throw new Error(String(answer.status));
    document.getElementById("now").innerHTML = await answer.text();
    away.hidden = true;
  } catch {
    away.hidden = false;
  }
  setTimeout(refresh, EVERY_MS);
}

setTimeout(refresh, EVERY_MS);
