// The data of the page as rows, and how a token and a number read. Nothing here touches what is shown.
const DATA = JSON.parse(document.getElementById("data").textContent);
const STUDENTS = ["before", "after"];
const TITLES = { teacher: "Teacher", before: "Before", after: "After" };
const NOT_STORED = -1;
const HIGH_KL = 0.2;

// Characters that are not seen or look like a space, or that turn the text around: U+202E would show a row's end first.
const UNSEEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb]|(?! )\p{Zs}|\p{Co}|\p{Cn}|\p{Cs}/u;
// These join letters and emoji within a token or fill a place, and are shown where they stand alone.
const JOINERS = /^\p{Default_Ignorable_Code_Point}+$/u;
const SIGNS = { "\n": "↵", "\r": "␍", "\t": "⇥" };

/**
 * The pieces of a token: plain text, and signs that stand for what would not be seen. Spaces at its ends are signs too
 * where a token stands alone; in running text only those that are a token by themselves.
 */
function spell(token, alone = false) {
  if (typeof token !== "string") return [{ sign: token.map((byte) => byte.toString(16).padStart(2, "0").toUpperCase()).join(" ") }];
  if (/^ +$/.test(token)) return [{ sign: "␣".repeat(token.length) }];
  if (alone) {
    const [, lead, middle, trail] = /^( *)(.*?)( *)$/su.exec(token);
    const signs = (spaces) => (spaces ? [{ sign: "␣".repeat(spaces.length) }] : []);
    return [...signs(lead), ...spell(middle), ...signs(trail)];
  }
  const pieces = [];
  const joins = JOINERS.test(token);
  for (const character of token) {
    if (joins || UNSEEN.test(character)) {
      const code = character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
      pieces.push({ sign: SIGNS[character] ?? `U+${code}` });
    } else if (pieces.length && pieces.at(-1).text !== undefined) {
      pieces.at(-1).text += character;
    } else {
      pieces.push({ text: character });
    }
  }
  return pieces;
}

/** A token in quotation marks, as one string for labels and for screen readers. */
function quote(token) {
  if (typeof token !== "string") return `bytes ${spell(token)[0].sign}`;
  const names = { "\n": "line break", "\t": "tab", " ": "space" };
  if (/^\s+$/.test(token)) {
    const known = names[token[0]];
    if (known && token === token[0].repeat(token.length)) return token.length > 1 ? `${token.length} × ${known}` : known;
  }
  return `“${spell(token).map((piece) => piece.text ?? piece.sign).join("")}”`;
}

/** The text of tokens end to end; characters that are split over tokens come together again. */
function join(tokens) {
  const encoder = new TextEncoder();
  const parts = tokens.map((token) => (typeof token === "string" ? encoder.encode(token) : Uint8Array.from(token)));
  const bytes = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let place = 0;
  for (const part of parts) {
    bytes.set(part, place);
    place += part.length;
  }
  return new TextDecoder().decode(bytes);
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

/** The number of the colour, from 0. */
function colourClass(kl) {
  return DATA.edges.filter((edge) => kl >= edge).length;
}

function mean(values) {
  return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : 0;
}

/** A probability; null where the transfer set did not store this token. */
function probability(code) {
  return code === NOT_STORED ? null : Math.exp(-code / 10000);
}

function readRow(packed) {
  const starts = [0];
  for (const count of packed.counts) starts.push(starts.at(-1) + count);
  const tokens = packed.tokens.map((place) => DATA.strings[place]);
  const texts = packed.contexts.map(([, text]) => text);
  const row = {
    ...packed,
    tokens,
    firsts: { before: packed.first_before, after: packed.first_after },
    means: { before: mean(packed.before), after: mean(packed.after) },
    worst: packed.after.reduce((most, kl, place) => (kl > packed.after[most] ? place : most), 0),
    search: `${texts.join("\n")}\n${join(tokens)}`.toLowerCase(),
  };
  /** What could have stood at token `place`, the teacher's most probable first. */
  row.alternativesAt = (place) => {
    const found = [];
    for (let entry = starts[place]; entry < starts[place + 1]; entry += 1) {
      const at = entry - starts[place];
      found.push({
        token: DATA.strings[packed.ids[entry]],
        teacher: probability(packed.p_teacher[entry]),
        before: probability(packed.p_before[entry]),
        after: probability(packed.p_after[entry]),
        inText: packed.ids[entry] === packed.tokens[place],
        first: { teacher: at === 0, before: at === packed.first_before[place], after: at === packed.first_after[place] },
      });
    }
    return found;
  };
  return row;
}

const ROWS = DATA.rows.map(readRow);
