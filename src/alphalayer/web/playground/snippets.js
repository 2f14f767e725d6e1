// A request as a program that saves the image: curl, Python, JavaScript.

const NAME = "ALPHALAYER_API_KEY";

/** Return a program. `withKey`: it sends the key in the environment variable. */
export function snippet(language, address, body, withKey) {
  return { curl, python, javascript }[language](`${address}alpha/v1/txt2img`, body, withKey);
}

function curl(url, body, withKey) {
  const lines = [
    `url=$(curl -sSf ${url}`,
    "-H 'Content-Type: application/json'",
    ...(withKey ? [`-H "X-API-Key: $${NAME}"`] : []),
    `-d '${JSON.stringify(body).replaceAll("'", "'\\''")}' | cut -d '"' -f 4)`,
  ];
  return `${lines.join(" \\\n  ")}\ncurl -sSO "$url"`;
}

function python(url, body, withKey) {
  const key = withKey ? `, headers={"X-API-Key": os.environ["${NAME}"]}` : "";
  return `${withKey ? "import os\n\n" : ""}import requests

body = ${literal(body)}
answer = requests.post("${url}", json=body${key}, timeout=600)
answer.raise_for_status()
image = requests.get(answer.json()["url"], timeout=60).content
with open(answer.json()["filename"], "wb") as file:
    file.write(image)`;
}

function javascript(url, body, withKey) {
  const key = withKey ? `, "X-API-Key": process.env.${NAME}` : "";
  return `import { writeFile } from "node:fs/promises";

const answer = await fetch("${url}", {
  method: "POST",
  headers: { "Content-Type": "application/json"${key} },
  body: JSON.stringify(${JSON.stringify(body, null, 2).replaceAll("\n", "\n  ")}),
});
if (!answer.ok) throw new Error(await answer.text());
const { url, filename } = await answer.json();
const image = await fetch(url);
await writeFile(filename, Buffer.from(await image.arrayBuffer()));`;
}

const literal = (body) =>
  `{${Object.entries(body)
    .map(([name, value]) => `"${name}": ${typeof value === "boolean" ? (value ? "True" : "False") : JSON.stringify(value)}`)
    .join(", ")}}`;
