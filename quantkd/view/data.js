// The page's data as rows, and the spelling of a token and a number. Nothing here touches the document's elements.
const DATA = JSON.parse(document.getElementById("data").textContent);
const STUDENTS = ["before", "after"];
const TITLES = { teacher: "Teacher", before: "Before", after: "After" };
const NOT_STORED = -1;
const HIGH_KL = 0.2;

// Characters that are invisible or look like a space, or that turn the text around: U+202E would show a row's end first.
const UNSEEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\u2800\u3164\ufeff\uffa0\ufff9-\ufffb\u{e0000}-\u{e007f}]|(?! )\p{Zs}|\p{Co}|\p{Cn}|\p{Cs}/u;
// These join letters and emoji within a token or fill a place. They get a sign only where they stand alone.
const JOINERS = /^\p{Default_Ignorable_Code_Point}+$/u;
const SIGNS = { "\n": "↵", "\r": "␍", "\t": "⇥" };

function hex(number, width) {
  return number.toString(16).toUpperCase().padStart(width, "0");
}

/**
 * The pieces of a token: plain text, and signs for what would be invisible. Spaces at its ends are signs too where a
 * token stands alone; in running text only those that are a token by themselves.
 */
function spell(token, alone = false) {
  if (typeof token !== "string") return [{ sign: token.map((byte) => hex(byte, 2)).join(" ") }];
  const [, lead, middle, trail] = /^( *)(.*?)( *)$/su.exec(token);
  const spaces = (text) => (text ? [{ sign: "␣".repeat(text.length) }] : []);
  if (middle === "") return spaces(lead);
  if (alone) return [...spaces(lead), ...spell(middle), ...spaces(trail)];
  const pieces = [];
  const joins = JOINERS.test(token);
  for (const character of token) {
    if (joins || UNSEEN.test(character)) {
      pieces.push({ sign: SIGNS[character] ?? `U+${hex(character.codePointAt(0), 4)}` });
    } else if (pieces.at(-1)?.text !== undefined) {
      pieces.at(-1).text += character;
    } else {
      pieces.push({ text: character });
    }
  }
  return pieces;
}

/** A token as one string, for labels and for screen readers. */
function quote(token) {
  const text = spell(token).map((piece) => piece.text ?? piece.sign).join("");
  if (typeof token !== "string") return `bytes ${text}`;
  const name = { "\n": "line break", "\t": "tab", " ": "space" }[token[0]];
  if (!name || token !== token[0].repeat(token.length)) return `“${text}”`;
  return token.length > 1 ? `${token.length} × ${name}` : name;
}

/** The text of tokens end to end; characters that are split over tokens come together again. */
function join(tokens) {
  const encoder = new TextEncoder();
  const bytes = tokens.flatMap((token) => (typeof token === "string" ? [...encoder.encode(token)] : token));
  return new TextDecoder().decode(Uint8Array.from(bytes));
}

/** The text that the bytes of token `place` make with those around it, and whether they begin it; or null. */
function wholeCharacter(tokens, place) {
  if (typeof tokens[place] === "string") return null;
  let start = place;
  let stop = place + 1;
  while (start > 0 && typeof tokens[start - 1] !== "string") start -= 1;
  while (stop < tokens.length && typeof tokens[stop] !== "string") stop += 1;
  const text = join(tokens.slice(start, stop));
  return text.includes("\ufffd") ? null : { text, begins: start === place };
}

function formatKl(kl) {
  if (kl < 0.0005) return "<0.001";
  return kl < 10 ? kl.toFixed(kl < 1 ? 3 : 2) : kl.toFixed(1);
}

function formatShare(share) {
  if (share === null) return "–";
  const percent = 100 * share;
  if (percent >= 99.95) return percent > 99.995 ? "100%" : ">99.9%";
  if (percent >= 0.05) return `${percent.toFixed(percent < 9.95 ? 2 : 1)}%`;
  return percent > 0 ? "<0.05%" : "0%";
}

/** The number of the color, from 0. */
function colorClass(kl) {
  return DATA.edges.filter((edge) => kl >= edge).length;
}

function mean(values) {
  return values.reduce((sum, value) => sum + value, 0) / Math.max(values.length, 1);
}

function readRow(packed) {
  const tokens = packed.tokens.map((place) => DATA.strings[place]);
  const starts = [0];
  for (const count of packed.counts) starts.push(starts.at(-1) + count);
  return {
    ...packed,
    targets: packed.tokens,
    tokens,
    starts,
    means: { before: mean(packed.before), after: mean(packed.after) },
    search: [...packed.contexts.map(([, text]) => text), join(tokens)].join("\n").toLowerCase(),
  };
}

/** What could have stood at token `place`, the teacher's most probable first. A probability that was not stored is null. */
function alternativesAt(row, place) {
  const firsts = { teacher: 0, before: row.first_before[place], after: row.first_after[place] };
  return row.ids.slice(row.starts[place], row.starts[place + 1]).map((id, at) => {
    const entry = { token: DATA.strings[id], inText: id === row.targets[place], first: {} };
    for (const model of Object.keys(TITLES)) {
      const code = row[`p_${model}`][row.starts[place] + at];
      entry[model] = code === NOT_STORED ? null : Math.exp(-code / 10000);
      entry.first[model] = at === firsts[model];
    }
    return entry;
  });
}

const ROWS = DATA.rows.map(readRow);
