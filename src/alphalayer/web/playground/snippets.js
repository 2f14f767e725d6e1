// A request as a program that saves the result: curl, Python, JavaScript.

const NAME = "ALPHALAYER_API_KEY";

/**
 * Return a program for a request: {url, body, files, withKey}.
 * `files` are names of files by field: with them the request is a form. `withKey`: the program
 * sends the key in the environment variable. Of layers it saves the PSD.
 */
export function snippet(language, request) {
  const hasFiles = Object.keys(request.files).length > 0;
  return { curl, python, javascript }[language]({ ...request, hasFiles, isLayers: request.url.endsWith("/layers") });
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function curl({ url, body, files, hasFiles, withKey, isLayers }) {
  const fields = hasFiles
    ? [
        ...Object.entries(body).map(([name, value]) => `--form-string ${quoted(`${name}=${value}`)}`),
        ...Object.entries(files).map(([name, file]) => `-F ${quoted(`${name}=@"${file}"`)}`),
      ]
    : ["-H 'Content-Type: application/json'", `-d ${quoted(JSON.stringify(body))}`];
  const find = isLayers ? `grep -o 'http[^"]*layers.psd[^"]*'` : `cut -d '"' -f 4`;
  const key = withKey ? [`-H "X-API-Key: $${NAME}"`] : [];
  const lines = [`url=$(curl -sSf ${url}`, ...key, ...fields];
  return `${lines.join(" \\\n  ")} | ${find})\ncurl -sSOJ "$url"`;
}

function python({ url, body, files, hasFiles, withKey, isLayers }) {
  const key = withKey ? `, headers={"X-API-Key": os.environ["${NAME}"]}` : "";
  const opened = Object.entries(files).map(([name, file]) => `"${name}": open(${JSON.stringify(file)}, "rb")`);
  const fields = hasFiles ? `data=body, files={${opened.join(", ")}}` : "json=body";
  const [address, name] = isLayers ? ['answer.json()["documents"]["psd"]', '"layers.psd"'] : ['answer.json()["url"]', 'answer.json()["filename"]'];
  return `${withKey ? "import os\n\n" : ""}import requests

body = ${literal(body)}
answer = requests.post("${url}", ${fields}${key}, timeout=600)
answer.raise_for_status()
image = requests.get(${address}, timeout=60).content
with open(${name}, "wb") as file:
    file.write(image)`;
}

function javascript({ url, body, files, hasFiles, withKey, isLayers }) {
  const key = withKey ? `"X-API-Key": process.env.${NAME}` : "";
  const fields = JSON.stringify(body, null, 2).replaceAll("\n", "\n  ");
  const form = Object.entries(files).map(([name, file]) => `form.set("${name}", new Blob([await readFile(${JSON.stringify(file)})]), ${JSON.stringify(file)});\n`);
  const headers = [hasFiles ? "" : '"Content-Type": "application/json"', key].filter(Boolean).join(", ");
  const [address, name] = isLayers ? ["documents.psd", '"layers.psd"'] : ["url", "filename"];
  return `import { ${hasFiles ? "readFile, " : ""}writeFile } from "node:fs/promises";

${hasFiles ? `const form = new FormData();\nfor (const [name, value] of Object.entries(${JSON.stringify(body)})) form.set(name, value);\n${form.join("")}` : ""}const answer = await fetch("${url}", {
  method: "POST",
  headers: { ${headers} },
  body: ${hasFiles ? "form" : `JSON.stringify(${fields})`},
});
if (!answer.ok) throw new Error(await answer.text());
const { ${isLayers ? "documents" : "url, filename"} } = await answer.json();
const image = await fetch(${address});
await writeFile(${name}, Buffer.from(await image.arrayBuffer()));`;
}

const literal = (body) =>
  `{${Object.entries(body)
    .map(([name, value]) => `"${name}": ${typeof value === "boolean" ? (value ? "True" : "False") : JSON.stringify(value)}`)
    .join(", ")}}`;
