// What serve_load.py has k6 do: one headline a request. Without RATE each of USERS asks again as soon as it is answered; with
// it that many requests a second begin whoever waits, as long as one of USERS is free.
import http from "k6/http"
import { SharedArray } from "k6/data"

const texts = new SharedArray("texts", () => JSON.parse(open(__ENV.TEXTS)))
const users = Number(__ENV.USERS), rate = Number(__ENV.RATE), duration = `${__ENV.SECONDS}s`

export const options = {
  discardResponseBodies: true,
  scenarios: {
    load: rate
      ? { executor: "constant-arrival-rate", rate, duration, preAllocatedVUs: users, maxVUs: users, gracefulStop: "30s" }
      : { executor: "constant-vus", vus: users, duration, gracefulStop: "30s" },
  },
}

export default function () {
  const text = texts[Math.floor(Math.random() * texts.length)]
  http.post(__ENV.URL, JSON.stringify({ texts: [text] }), { headers: { "Content-Type": "application/json" }, timeout: "60s" })
}
