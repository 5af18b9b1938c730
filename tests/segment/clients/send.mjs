// Sends calls with Segment's library for Node and prints each one's type and messageId, one JSON object a line.
//   node send.mjs --host http://127.0.0.1:8080 --write-key KEY --count 10
// Exits with 1 when the library gave up on a call.
import { randomUUID } from "node:crypto";
import { parseArgs } from "node:util";
import { Analytics } from "@segment/analytics-node";

const string = { type: "string" };
const { values } = parseArgs({ options: { host: string, "write-key": string, count: string } });
const analytics = new Analytics({ host: values.host, writeKey: values["write-key"], maxRetries: 10, flushAt: 20 });

let failedCount = 0;
analytics.on("error", ({ code, reason }) => console.error(code, reason?.message));

for (let number = 0; number < Number(values.count); number++) {
  const user = { userId: `node-${number}` };
  const calls = {
    identify: { ...user, traits: { plan: "pro", number } },
    track: { ...user, event: "Order Completed", properties: { total: number / 4, paid: true } },
    group: { ...user, groupId: `company-${number}`, traits: { name: "Größe GmbH" } },
    page: { ...user, name: "Home", properties: { url: "https://example.com/" } },
    screen: { ...user, name: "Start" },
    alias: { ...user, previousId: `anonymous-${number}` },
  };
  for (const [type, call] of Object.entries(calls)) {
    const messageId = `node-${type}-${randomUUID()}`;
    analytics[type]({ ...call, messageId }, (error) => (failedCount += error ? 1 : 0));
    console.log(JSON.stringify({ type, messageId }));
  }
}
await analytics.closeAndFlush({ timeout: 600_000 });
process.exitCode = failedCount ? 1 : 0;
