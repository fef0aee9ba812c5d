//! Random numbers of the counter generator, and what is kept by them.

use super::elements;
use crate::bf16::{Element, Work};
use crate::philox::Philox;

/// Turns the sign of every element whose bit of the generator is set: element `i` has bit `i % 32` of word `i / 32 % 4` at counter `i / 128`.
#[inline(always)]
pub fn flip<W: Work>(values: &mut [W], generator: Philox, from: u64) {
    let mut at = from;
    let mut rest = values;
    while !rest.is_empty() {
        let words = generator.words(at / 128);
        let word = words[(at / 32 % 4) as usize] >> (at % 32);
        let (now, later) = rest.split_at_mut(((32 - at % 32) as usize).min(rest.len()));
        for (i, v) in now.iter_mut().enumerate() {
            *v = if word >> i & 1 == 1 { -*v } else { *v };
        }
        at += now.len() as u64;
        rest = later;
    }
}

/// Normal deviates `from..from + into.len()` of a generator, times `scale`.
#[inline(always)]
pub fn normal<W: Work>(into: &mut [W], generator: Philox, from: u64, scale: f64) {
    let mut i = from;
    let mut into = into.iter_mut();
    if i % 2 == 1 {
        if let Some(w) = into.next() {
            *w = W::from_f64(generator.normal_pair(i / 2)[1] * scale);
        }
        i += 1;
    }
    while let Some(w) = into.next() {
        let [even, odd] = generator.normal_pair(i / 2);
        *w = W::from_f64(even * scale);
        if let Some(w) = into.next() {
            *w = W::from_f64(odd * scale);
        }
        i += 2;
    }
}

/// Random words, one an element: what has one below a limit stays.
#[derive(Debug, Clone, Copy)]
pub struct Draw<'a, W> {
    /// The words.
    pub words: &'a [u32],
    /// At most 2^32.
    pub limit: u64,
    /// What stays is multiplied by this.
    pub c: W,
}

/// `into = c * d` where the draw says so, else zero, with `d = x - base`; `sum = sum + into`, from zero when `first`. The largest
/// magnitude of `d`.
#[inline(always)]
pub fn draw_apart<E: Element, W: Work>(
    into: &mut [W],
    sum: &mut [W],
    pair: [&[u8]; 2],
    draw: Draw<'_, W>,
    first: bool,
) -> W::Magnitude {
    let Draw { words, limit, c } = draw;
    let mut largest = W::Magnitude::default();
    // 32 bits to a comparison, not 64.
    let (any, last) = (limit > 0, limit.saturating_sub(1) as u32);
    let pairs = elements::<E>(pair[0]).zip(elements::<E>(pair[1]));
    for (((into, sum), (x, b)), &word) in into.iter_mut().zip(sum).zip(pairs).zip(words) {
        let d = W::widen(x) - W::widen(b);
        largest = largest.max(d.magnitude());
        let kept = if any & (word <= last) { c * d } else { W::ZERO };
        *into = kept;
        *sum = if first { W::ZERO } else { *sum } + kept;
    }
    largest
}

/// `x = x / share` where the word is not above `last` and there is a share, else zero.
#[inline(always)]
pub fn keep_drawn<W: Work>(x: &mut [W], words: &[u32], last: &[u32], share: &[W]) {
    for (((x, &word), &last), &share) in x.iter_mut().zip(words).zip(last).zip(share) {
        *x = if (word <= last) & (share > W::ZERO) { *x / share } else { W::ZERO };
    }
}

/// Keeps `x * scale` where the word is below `limit`; the rest becomes zero.
#[inline(always)]
pub fn keep_random<W: Work>(x: &mut [W], words: &[u32], limit: u64, scale: W) {
    let (any, last) = (limit > 0, limit.saturating_sub(1) as u32);
    for (x, &word) in x.iter_mut().zip(words) {
        *x = if any & (word <= last) { *x * scale } else { W::ZERO };
    }
}

/// Words `from..from + into.len()` of a generator's stream: word `i` is word `i % 4` of counter `i / 4`. `from` is a multiple of 4.
#[inline(always)]
pub fn words(into: &mut [u32], generator: Philox, from: u64) {
    let (whole, rest) = into.as_chunks_mut::<4>();
    generator.words_from(from / 4, whole);
    if !rest.is_empty() {
        let last = generator.words(from / 4 + whole.len() as u64);
        rest.copy_from_slice(&last[..rest.len()]);
    }
}
