// The form that runs one request.
"use strict";
(() => {
  const { element } = draw;
  const by = (id) => document.getElementById(id);
  const SIZES = { BOOL: 1, UINT8: 1, INT8: 1, UINT16: 2, INT16: 2, FP16: 2, BF16: 2, UINT32: 4, INT32: 4, FP32: 4, UINT64: 8, INT64: 8, FP64: 8, BYTES: 4 };
  const half = (bits) => {
    const sign = bits >> 15 ? -1 : 1, power = (bits >> 10) & 31, part = bits & 1023;
    return sign * (power === 31 ? (part ? NaN : Infinity) : power ? 2 ** (power - 15) * (1 + part / 1024) : 2 ** -14 * (part / 1024));
  };
  const READ = {
    BOOL: (v, at) => !!v.getUint8(at), UINT8: (v, at) => v.getUint8(at), INT8: (v, at) => v.getInt8(at),
    UINT16: (v, at) => v.getUint16(at, true), INT16: (v, at) => v.getInt16(at, true), UINT32: (v, at) => v.getUint32(at, true),
    INT32: (v, at) => v.getInt32(at, true), UINT64: (v, at) => v.getBigUint64(at, true), INT64: (v, at) => v.getBigInt64(at, true),
    FP16: (v, at) => half(v.getUint16(at, true)), FP32: (v, at) => v.getFloat32(at, true), FP64: (v, at) => v.getFloat64(at, true),
    BF16: (v, at) => { const four = new DataView(new ArrayBuffer(4)); four.setUint16(2, v.getUint16(at, true), true); return four.getFloat32(0, true); },
  };
  const first = (view, datatype, most = 6) => {
    const values = [];
    let at = 0;
    while (at < view.byteLength && values.length < most) {
      if (datatype === "BYTES") {
        const size = view.getUint32(at, true);
        values.push(JSON.stringify(new TextDecoder().decode(new Uint8Array(view.buffer, view.byteOffset + at + 4, size))));
        at += 4 + size;
      } else {
        const value = READ[datatype](view, at);
        values.push(typeof value === "number" && !Number.isInteger(value) ? value.toPrecision(6) : String(value));
        at += SIZES[datatype];
      }
    }
    return values.join(", ") + (at < view.byteLength ? ", …" : "");
  };
  const sized = (inputs) => inputs.map((input) => ({ ...input, shape: input.shape.map((size) => (size < 0 ? 1 : size)) }));
  const elements = (input) => input.shape.reduce((a, b) => a * b, 1);
  const asked = async (name) => {
    const response = await fetch(`v2/models/${encodeURIComponent(name)}`);
    return sized((await response.json()).inputs);
  };
  const prepared = {
    example: async (name) => {
      const response = await fetch(`example/${encodeURIComponent(name)}`);
      if (!response.ok) throw new Error((await response.json()).error);
      return { body: await response.arrayBuffer(), length: response.headers.get("inference-header-content-length") };
    },
    zeros: async (name) => {
      const inputs = await asked(name);
      const sizes = inputs.map((input) => elements(input) * SIZES[input.datatype]);
      const head = new TextEncoder().encode(JSON.stringify({
        inputs: inputs.map(({ name, datatype, shape }, at) => ({ name, datatype, shape, parameters: { binary_data_size: sizes[at] } })) }));
      const body = new Uint8Array(head.length + sizes.reduce((a, b) => a + b, 0));
      body.set(head);
      return { body, length: String(head.length) };
    },
    json: async () => ({ body: by("json").value, length: null }),
  };
  const binary = (body, length) => { // ask for the outputs as bytes, because only their beginning is shown
    if (length === null) {
      const said = JSON.parse(body);
      return { body: JSON.stringify({ ...said, parameters: { ...said.parameters, binary_data_output: true } }), length };
    }
    const whole = new Uint8Array(body), head = JSON.parse(new TextDecoder().decode(whole.subarray(0, Number(length))));
    const asking = new TextEncoder().encode(JSON.stringify({ ...head, parameters: { ...head.parameters, binary_data_output: true } }));
    const made = new Uint8Array(asking.length + whole.length - Number(length));
    made.set(asking);
    made.set(whole.subarray(Number(length)), asking.length);
    return { body: made, length: String(asking.length) };
  };
  const shown = (answer, buffer, length) => {
    let at = length;
    return answer.outputs.map((output) => {
      const size = output.parameters?.binary_data_size;
      if (size === undefined) return [output.name, output.datatype, `[${output.shape.join(", ")}]`, output.data.slice(0, 6).join(", ")];
      const view = new DataView(buffer, at, size);
      at += size;
      return [output.name, output.datatype, `[${output.shape.join(", ")}]`, first(view, output.datatype)];
    });
  };
  by("source").addEventListener("change", async () => {
    const own = by("source").value === "json";
    by("json-label").hidden = !own;
    if (!own) return;
    const inputs = await asked(by("model").value);
    by("json").value = JSON.stringify({ inputs: inputs.map(({ name, datatype, shape }) => {
      const count = elements({ shape });
      return { name, datatype, shape, data: count <= 256 ? Array(count).fill(datatype === "BYTES" ? "" : datatype === "BOOL" ? false : 0) : [] };
    }) }, null, 1);
  });
  by("form").addEventListener("submit", async (event) => {
    event.preventDefault();
    by("run").disabled = true;
    by("ran").textContent = "running";
    by("outputs").replaceChildren();
    try {
      const name = by("model").value;
      const made = await prepared[by("source").value](name);
      const { body, length } = binary(made.body, made.length);
      const begun = performance.now();
      const response = await fetch(`v2/models/${encodeURIComponent(name)}/infer`, {
        method: "POST", body, headers: { "content-type": "application/octet-stream", ...(length ? { "inference-header-content-length": length } : {}) } });
      const buffer = await response.arrayBuffer();
      const took = performance.now() - begun;
      const head = Number(response.headers.get("inference-header-content-length") || buffer.byteLength);
      const answer = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 0, head)));
      if (!response.ok) throw new Error(answer.error);
      by("outputs").append(draw.table(["output", "type", "shape", "begins with"].map(draw.text), shown(answer, buffer, head)));
      by("ran").textContent = `Answered in ${took.toFixed(1)} ms.`;
    } catch (error) {
      by("ran").textContent = `No answer: ${error.message}`;
    } finally {
      by("run").disabled = false;
    }
  });
})();
