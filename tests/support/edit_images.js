// Edit images with npm's openai. Prints the answers as JSON. Arguments: base URL, seed.
const fs = require("node:fs");
const { OpenAI } = require("openai");

const [baseURL, seed] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none" });
const open = (name) => fs.createReadStream(name);

async function edit(fields) {
  return client.images.edit({
    model: "alphalayer-mini",
    prompt: "a green apple",
    quality: "low",
    seed: Number(seed),
    ...fields,
  });
}

async function main() {
  const answers = { events: [] };
  const forms = {
    one: { image: open("opaque.png") },
    several: { image: [open("opaque.png"), open("apple.png")] },
    masked: { image: open("opaque.png"), mask: open("mask.png") },
    transparent: { image: open("apple.png") },
  };
  for (const [name, fields] of Object.entries(forms))
    answers[name] = (await edit(fields)).data[0].b64_json;
  const stream = await edit({ image: open("opaque.png"), stream: true, partial_images: 1 });
  for await (const event of stream) {
    answers.events.push(event.type);
    answers.stream = event.b64_json;
  }
  console.log(JSON.stringify(answers));
}

main();
