// Reads one JSON object a line, asks Segment's published packages, writes each with the answer; see ../README.md.
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { createInterface } from "node:readline";

const require = createRequire(import.meta.url);
const { Destination, transform } = require("@segment/actions-core");
const { parseFql, validate } = require("@segment/destination-subscriptions");
const userpilot = require("@segment/action-destinations/dist/destinations/userpilot").default;

let requests = [];
const listener = createServer(async (request, response) => {
  let text = "";
  for await (const chunk of request) text += chunk;
  requests.push({ method: request.method, path: request.url.slice(1), body: JSON.parse(text) });
  response.writeHead(202).end();
});
await new Promise((ready) => listener.listen(0, "127.0.0.1", ready));

const destination = new Destination(userpilot);
const settings = {
  apiKey: "toy",
  endpoint: `http://127.0.0.1:${listener.address().port}/`,
  subscriptions: userpilot.presets,
};

// Which field, and whether it is missing or invalid: the wording of the packages may change.
function reason(error) {
  const faults = [...(error.errors ?? [])].map(({ pointer, message }) =>
    pointer ? `invalid field ${pointer.slice(1)}` : `missing required field ${message.match(/'(\w+)'/)[1]}`,
  );
  return faults.join(", ") || `failed with ${error.name}`;
}

async function sent({ call }) {
  requests = [];
  try {
    await (call.type === "delete" ? destination.onDelete(call, settings) : destination.onEvent(call, settings));
  } catch (error) {
    return { requests, refused: reason(error) };
  }
  return { requests };
}

function mapped({ mapping, payload }) {
  try {
    return { result: transform(mapping, payload) };
  } catch {
    return { invalid: true };
  }
}

const matched = ({ trigger, call }) => ({ matches: validate(parseFql(trigger), call) });

for await (const line of createInterface({ input: process.stdin })) {
  const question = JSON.parse(line);
  const answer = "mapping" in question ? mapped : "trigger" in question ? matched : sent;
  const answered = JSON.stringify(await answer(question));
  console.log(`${line.slice(0, -1)},${answered.slice(1)}`); // the question stays as it came, to the digit
}
listener.close();
