// The jobs of this page that are not over: place in the queue, step, time left, and a button that cancels.

const section = document.getElementById("queue");
const list = document.getElementById("jobs");

/** A row for a job; `cancel` is called when it is to be stopped. */
export function row(prompt, cancel) {
  const text = element("span", "what", prompt);
  const bar = document.createElement("progress");
  bar.setAttribute("aria-label", `Progress of ${prompt}`);
  const state = element("span", "how", "Sent");
  const button = element("button", "quiet", "Cancel");
  button.type = "button";
  button.setAttribute("aria-label", `Cancel ${prompt}`);
  button.addEventListener("click", () => {
    button.disabled = true;
    cancel();
  });
  const item = document.createElement("li");
  item.append(text, bar, state, button);
  list.append(item);
  section.hidden = false;
  return {
    update(job) {
      state.textContent = describe(job);
      if (job.position === 0 && job.steps) [bar.max, bar.value] = [job.steps, job.step];
      else bar.removeAttribute("value");
    },
    say: (words) => (state.textContent = words),
    remove() {
      item.remove();
      section.hidden = list.children.length === 0;
    },
  };
}

/** How a job stands, in words. */
export function describe(job) {
  const left = job.eta_s == null ? "" : `, ${job.eta_s < 1.5 ? "a second" : `${Math.round(job.eta_s)} s`} left`;
  if (job.position > 0) return job.position === 1 ? `Next in the queue${left}` : `Number ${job.position} in the queue${left}`;
  if (job.stage === "sample") return `Step ${job.step} of ${job.steps}${left}`;
  return { load: "Loading the model", text: "Reading the prompt", vae: "Decoding", decode: "Decoding", store: "Saving" }[job.stage] ?? "Starting";
}

function element(tag, name, text) {
  const made = document.createElement(tag);
  made.className = name;
  made.textContent = text;
  return made;
}
