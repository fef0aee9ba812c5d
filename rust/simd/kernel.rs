//! The bodies: what is computed, once, for every format and every instruction set.
//!
//! Kernels borrow and never allocate. They run over at most [`MICRO`] elements at a time, so that everything they touch stays
//! in the first-level cache, and because the order of the sums is part of the result (see [`dot`]).
//!
//! One loop does one simple thing: that is what compilers turn into vector code, and what comes from the first-level cache costs nothing.

use crate::bf16::{Element, Work};

/// Elements that one call handles, and the unit in which sums are made.
pub const MICRO: usize = 4096;
/// Partial sums.
const LANES: usize = 16;
/// Elements that they take at a time.
const GROUP: usize = 4 * LANES;

/// How the realised change of a tensor compares with the intended one (design section 3.4).
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Rounding {
    /// Sum of `u * u`, with `u` the intended update.
    pub intended: f64,
    /// Sum of `r * r`, with `r` the difference of output and target.
    pub realised: f64,
    /// Sum of `u * r`.
    pub dot: f64,
    /// Elements with `u != 0`.
    pub updated: u64,
    /// Of those, the ones whose output equals the target.
    pub lost: u64,
}

impl Rounding {
    /// Adds the sums of what follows.
    pub fn join(&mut self, next: &Self) {
        self.intended += next.intended;
        self.realised += next.realised;
        self.dot += next.dot;
        self.updated += next.updated;
        self.lost += next.lost;
    }
}

/// Adds the products of a group to the lanes.
#[inline(always)]
fn add_products<W: Work>(lanes: &mut [f64; LANES], a: &[W; GROUP], b: &[W; GROUP]) {
    let mut fours = [W::ZERO; LANES];
    for j in 0..LANES {
        let first = a[j] * b[j] + a[j + LANES] * b[j + LANES];
        let second = a[j + 2 * LANES] * b[j + 2 * LANES] + a[j + 3 * LANES] * b[j + 3 * LANES];
        fours[j] = first + second;
    }
    for j in 0..LANES {
        lanes[j] += fours[j].to_f64();
    }
}

/// The last group, filled up with zeros, whose products change no sum.
#[inline(always)]
fn filled<W: Work>(values: &[W]) -> [W; GROUP] {
    let mut group = [W::ZERO; GROUP];
    group[..values.len()].copy_from_slice(values);
    group
}

#[inline(always)]
fn elements<E: Element>(bytes: &[u8]) -> impl Iterator<Item = E> + '_ {
    bytes.chunks_exact(E::SIZE).map(E::load)
}

/// `into = widen(from)`.
#[inline(always)]
pub fn widen<E: Element, W: Work>(into: &mut [W], from: &[u8]) {
    for (w, e) in into.iter_mut().zip(elements::<E>(from)) {
        *w = W::widen(e);
    }
}

/// `acc = c * v`, or `acc + c * v` when not `first`.
#[inline(always)]
pub fn scaled<E: Element, W: Work>(acc: &mut [W], v: &[u8], c: W, first: bool) {
    if first {
        for (a, v) in acc.iter_mut().zip(elements::<E>(v)) {
            *a = c * W::widen(v);
        }
    } else {
        for (a, v) in acc.iter_mut().zip(elements::<E>(v)) {
            *a = *a + c * W::widen(v);
        }
    }
}

/// `acc = c * v`, or `acc + c * v`, for elements that are already widened.
#[inline(always)]
pub fn scaled_work<W: Work>(acc: &mut [W], v: &[W], c: W, first: bool) {
    if first {
        for (a, &v) in acc.iter_mut().zip(v) {
            *a = c * v;
        }
    } else {
        for (a, &v) in acc.iter_mut().zip(v) {
            *a = *a + c * v;
        }
    }
}

/// `acc = c * (p - n)`, or `acc + c * (p - n)`: the difference first, then the scale, then the sum.
#[inline(always)]
pub fn difference<E: Element, W: Work>(acc: &mut [W], p: &[u8], n: &[u8], c: W, first: bool) {
    let pairs = elements::<E>(p).zip(elements::<E>(n));
    if first {
        for (a, (p, n)) in acc.iter_mut().zip(pairs) {
            *a = c * (W::widen(p) - W::widen(n));
        }
    } else {
        for (a, (p, n)) in acc.iter_mut().zip(pairs) {
            *a = *a + c * (W::widen(p) - W::widen(n));
        }
    }
}

/// Two factors, widened, and what their product is multiplied by.
#[derive(Debug, Clone, Copy)]
pub struct PanelOf<'a, P> {
    /// `rows x rank`, row by row.
    pub left: &'a [f64],
    /// `rank` rows, `stride` apart.
    pub right: &'a [P],
    /// Products in a sum.
    pub rank: usize,
    /// From a row of `right` to the next.
    pub stride: usize,
    /// Times every sum.
    pub scale: f64,
}

/// Columns whose sums stand in registers together.
const STRIP: usize = 32;

/// `acc = c * v`, or `acc + c * v`, with `v = scale * left @ right` rounded once from f64: whole rows of `width` elements. Products are added
/// with k ascending, from zero.
#[inline(always)]
pub fn product<P: Work, W: Work>(acc: &mut [W], panel: PanelOf<'_, P>, width: usize, c: W, first: bool) {
    let PanelOf { left, right, rank, stride, scale } = panel;
    let mut column = 0;
    // Strip by strip, so that a strip of `right` stays in the first-level cache for all rows.
    while column < width {
        let here = STRIP.min(width - column);
        for (acc, left) in acc.chunks_exact_mut(width).zip(left.chunks_exact(rank)) {
            let mut sums = [0.0f64; STRIP];
            if here == STRIP {
                for (k, &l) in left.iter().enumerate() {
                    let Some(strip) = right[k * stride + column..].first_chunk::<STRIP>() else { return };
                    for j in 0..STRIP {
                        sums[j] += l * strip[j].to_f64();
                    }
                }
            } else {
                for (k, &l) in left.iter().enumerate() {
                    for (sum, r) in sums.iter_mut().zip(&right[k * stride + column..][..here]) {
                        *sum += l * r.to_f64();
                    }
                }
            }
            for (a, &sum) in acc[column..column + here].iter_mut().zip(&sums) {
                let v = c * W::from_f64(scale * sum);
                *a = if first { v } else { *a + v };
            }
        }
        column += here;
    }
}

/// `acc = acc - n`, for donors of different formats.
#[inline(always)]
pub fn subtract<E: Element, W: Work>(acc: &mut [W], n: &[u8]) {
    for (a, n) in acc.iter_mut().zip(elements::<E>(n)) {
        *a = *a - W::widen(n);
    }
}

/// `out = round(t + u)`, and the target's own bits where `u` is zero. Whether all results are finite.
#[inline(always)]
pub fn finish<E: Element, W: Work>(out: &mut [u8], t: &[u8], u: &[W]) -> bool {
    let mut finite = true;
    for ((o, t), &u) in out.chunks_exact_mut(E::SIZE).zip(elements::<E>(t)).zip(u) {
        let sum = (W::widen(t) + u).narrow::<E>();
        let value = if u == W::ZERO { t } else { sum };
        finite &= value.finite();
        value.store(o);
    }
    finite
}

/// [`finish`] into another format, from a target that is already widened.
#[inline(always)]
pub fn finish_as<O: Element, W: Work>(out: &mut [u8], t: &[W], u: &[W]) -> bool {
    let mut finite = true;
    for ((o, &t), &u) in out.chunks_exact_mut(O::SIZE).zip(t).zip(u) {
        let value = (if u == W::ZERO { t } else { t + u }).narrow::<O>();
        finite &= value.finite();
        value.store(o);
    }
    finite
}

/// How many updates there are, and how many of them changed nothing.
#[inline(always)]
pub fn count_lost<W: Work>(u: &[W], r: &[W]) -> (u64, u64) {
    let (mut updated, mut lost) = (0u32, 0u32);
    for (&u, &r) in u.iter().zip(r) {
        let moves = u != W::ZERO;
        updated += u32::from(moves);
        lost += u32::from(moves & (r == W::ZERO));
    }
    (u64::from(updated), u64::from(lost))
}

/// `r = out - t`: what became of the target, which is widened already.
#[inline(always)]
pub fn change<O: Element, W: Work>(r: &mut [W], out: &[u8], t: &[W]) {
    for ((r, o), &t) in r.iter_mut().zip(elements::<O>(out)).zip(t) {
        *r = W::widen(o) - t;
    }
}

/// [`finish`] and [`change`] in one go, for a target of the output's format.
#[inline(always)]
pub fn finish_change<E: Element, W: Work>(out: &mut [u8], t: &[u8], u: &[W], r: &mut [W]) -> bool {
    let mut largest = W::Magnitude::default();
    for (((o, t), &u), r) in out.chunks_exact_mut(E::SIZE).zip(elements::<E>(t)).zip(u).zip(r.iter_mut()) {
        let before = W::widen(t);
        let sum = before + u;
        largest = largest.max(sum.magnitude());
        let value = if u == W::ZERO { t } else { sum.narrow_below::<E>() };
        *r = W::widen(value) - before;
        value.store(o);
    }
    if largest < W::limit::<E>() {
        return true;
    }
    // Something is not finite, or does not fit: again, with the rounding that minds it.
    let finite = finish::<E, W>(out, t, u);
    for ((r, o), t) in r.iter_mut().zip(elements::<E>(out)).zip(elements::<E>(t)) {
        *r = W::widen(o) - W::widen(t);
    }
    finite
}

/// Sum of `a * b` over at most MICRO elements. Of every [`GROUP`] of 64, lane `j` of [`LANES`] adds up the products at `j`, `j + 16`,
/// `j + 32` and `j + 48` in the work type, and takes the four together into its f64 sum; in the end the lanes join pairwise.
#[inline(always)]
pub fn dot<W: Work>(a: &[W], b: &[W]) -> f64 {
    let mut lanes = [0.0; LANES];
    let (whole, rest) = a.as_chunks::<GROUP>();
    let (whole_b, rest_b) = b.as_chunks::<GROUP>();
    for (a, b) in whole.iter().zip(whole_b) {
        add_products(&mut lanes, a, b);
    }
    if !rest.is_empty() {
        add_products(&mut lanes, &filled(rest), &filled(rest_b));
    }
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// What there is to know of some differences.
#[derive(Debug, Clone, Copy)]
pub struct Extent<W> {
    /// The largest absolute value.
    pub max: W,
    /// Non-zero elements.
    pub moved: u64,
    /// Whether all are finite.
    pub finite: bool,
    /// Sum of squares, in the order of [`dot`].
    pub squares: f64,
}

/// Looks at at most MICRO elements, and writes one bit for each: set where it is not zero (bit `i % 8` of byte `i / 8`; whole 64-bit words).
#[inline(always)]
pub fn extent<W: Work>(bits: &mut [u8], x: &[W]) -> Extent<W> {
    let mut largest = W::Magnitude::default();
    for x in x {
        largest = largest.max(x.magnitude());
    }
    let mut max = W::from_magnitude(largest);
    let finite = max.is_finite();
    if !finite {
        max = x.iter().fold(W::ZERO, |m, x| if x.abs() > m { x.abs() } else { m });
    }
    let (whole, rest) = x.as_chunks::<64>();
    let (words, last) = bits.split_at_mut(whole.len() * 8);
    let mut moved = 0;
    for (bytes, x) in words.as_chunks_mut::<8>().0.iter_mut().zip(whole) {
        let mut word = 0u64;
        for (j, &x) in x.iter().enumerate() {
            word |= u64::from(x != W::ZERO) << j;
        }
        *bytes = word.to_le_bytes();
        moved += word.count_ones();
    }
    if !rest.is_empty() {
        let word = rest.iter().enumerate().fold(0u64, |w, (j, &x)| w | u64::from(x != W::ZERO) << j);
        last[..8].copy_from_slice(&word.to_le_bytes());
        moved += word.count_ones();
    }
    Extent { max, moved: u64::from(moved), finite, squares: dot(x, x) }
}

/// Elements of [`pick`] that are written before anybody counts: in a tensor that RL moved, a word of 64 seldom has more.
const LIKELY: usize = 12;

/// Writes the elements whose bits are set (as [`extent`] writes them) one behind the other; how many. `into` has room for all of `x` and 64 more.
///
/// Every word writes the same number of elements first, set or not, and the next one begins behind those that count: where a word ends is
/// not to be guessed, and a wrong guess costs as much as ten elements.
#[inline(always)]
pub fn pick<W: Work>(into: &mut [W], bits: &[u8], x: &[W]) -> usize {
    let mut at = 0;
    let (whole, rest) = x.as_chunks::<64>();
    let (words, last) = bits.split_at(whole.len() * 8);
    for (bytes, x) in words.as_chunks::<8>().0.iter().zip(whole) {
        at += pick_word(&mut into[at..], u64::from_le_bytes(*bytes), x);
    }
    if let (Some(bytes), false) = (last.first_chunk(), rest.is_empty()) {
        at += pick_word(&mut into[at..], u64::from_le_bytes(*bytes), &filled(rest));
    }
    at
}

#[inline(always)]
fn pick_word<W: Work>(into: &mut [W], mut word: u64, x: &[W; 64]) -> usize {
    let Some(into) = into.first_chunk_mut::<64>() else { return 0 };
    let count = word.count_ones() as usize;
    let (likely, more) = into.split_at_mut(LIKELY);
    for o in likely {
        *o = x[word.trailing_zeros() as usize % 64];
        word &= word.wrapping_sub(1);
    }
    for o in more {
        if word == 0 {
            break;
        }
        *o = x[word.trailing_zeros() as usize % 64];
        word &= word - 1;
    }
    count
}

/// Whether `n + u`, or `n` where `u` is zero, is `p` bit for bit, for every element: then nothing needs rounding, and [`finish`] gives `p` back
/// (but for which NaN a NaN is). Where this says no, [`finish`] may still do so, because it rounds.
#[inline(always)]
pub fn rebuilds<E: Element, W: Work>(p: &[u8], n: &[u8], u: &[W]) -> bool {
    let mut differs = W::Magnitude::default();
    for ((p, n), &u) in elements::<E>(p).zip(elements::<E>(n)).zip(u) {
        let n = W::widen(n);
        let sum = if u == W::ZERO { n } else { n + u };
        differs = differs | (sum.bits() ^ W::widen(p).bits());
    }
    differs == W::Magnitude::default()
}

/// How many positions both moved, and how many of those in the same direction.
#[inline(always)]
pub fn agreement<W: Work>(a: &[W], b: &[W]) -> (u64, u64) {
    let mut both = 0u32;
    let mut agree = 0u32;
    for (&a, &b) in a.iter().zip(b) {
        let moved = (a != W::ZERO) & (b != W::ZERO);
        both += u32::from(moved);
        agree += u32::from(moved & ((a > W::ZERO) == (b > W::ZERO)));
    }
    (u64::from(both), u64::from(agree))
}

/// Columns of a strip whose rows are turned.
pub const TURNED: usize = 16;

/// Turns rows `from` and `from + 1` of a strip by a cosine and a sine, then the two before by the next ones, and so on.
#[inline(always)]
pub fn turn<W: Work>(strip: &mut [W], from: usize, turns: &[[W; 2]]) {
    let rows = strip.as_chunks_mut::<TURNED>().0;
    if turns.is_empty() {
        return;
    }
    let mut above = rows[from + 1];
    let mut at = from;
    for &[c, s] in turns {
        let below = rows[at];
        for (o, (&a, &b)) in rows[at + 1].iter_mut().zip(below.iter().zip(&above)) {
            *o = s * a + c * b;
        }
        for (b, &a) in above.iter_mut().zip(&below) {
            *b = c * a - s * *b;
        }
        rows[at] = above;
        at = at.wrapping_sub(1);
    }
}

/// `into[i][..columns] += sum over k of a[i][k] * b[k][..columns]` for the rows, the depth and the columns of a size. Rows of `into`, `a` and `b` are
/// `strides` apart. Every element's products are added in the order of `k`, then to what was there: the same bits whatever the
/// register tile is, which `tall` chooses.
#[inline(always)]
pub fn multiply<W: Work>(into: &mut [W], a: &[W], b: &[W], strides: [usize; 3], size: [usize; 3], tall: usize) {
    // Tiles that leave every sum in a register, measured; wider ones are slower even where registers are left over.
    match (size_of::<W>() > 4, tall) {
        (true, 12..) => tiles::<W, 12, 8>(into, a, b, strides, size),
        (true, 6..) => tiles::<W, 4, 8>(into, a, b, strides, size),
        (true, _) => tiles::<W, 2, 8>(into, a, b, strides, size),
        (false, 12..) => tiles::<W, 12, 16>(into, a, b, strides, size),
        (false, 6..) => tiles::<W, 4, 16>(into, a, b, strides, size),
        (false, _) => tiles::<W, 2, 8>(into, a, b, strides, size),
    }
}

/// [`multiply`] in tiles of `R` rows and `C` columns, and smaller ones at the edges.
#[inline(always)]
fn tiles<W: Work, const R: usize, const C: usize>(
    into: &mut [W],
    a: &[W],
    b: &[W],
    strides: [usize; 3],
    [rows, depth, columns]: [usize; 3],
) {
    if depth == 0 {
        return;
    }
    let whole = columns - columns % C;
    for j in (0..whole).step_by(C) {
        let b = &b[j..];
        let mut i = 0;
        while i < rows {
            let (into, a) = (&mut into[i * strides[0] + j..], &a[i * strides[1]..]);
            i += match rows - i {
                left if left >= R => tile::<W, R, C>(into, a, b, strides, depth),
                4.. => tile::<W, 4, C>(into, a, b, strides, depth),
                2.. => tile::<W, 2, C>(into, a, b, strides, depth),
                _ => tile::<W, 1, C>(into, a, b, strides, depth),
            };
        }
    }
    if whole < columns {
        let width = columns - whole;
        for i in 0..rows {
            let mut sums = [W::ZERO; C];
            let sums = &mut sums[..width];
            for (k, &a) in a[i * strides[1]..][..depth].iter().enumerate() {
                for (s, &b) in sums.iter_mut().zip(&b[k * strides[2] + whole..][..width]) {
                    *s = *s + a * b;
                }
            }
            for (o, &s) in into[i * strides[0] + whole..][..width].iter_mut().zip(&*sums) {
                *o = *o + s;
            }
        }
    }
}

/// A register tile of [`multiply`]. Bounds that are constants, and no iterator over lanes: otherwise compilers keep sums in memory or take a lane apart.
#[inline(always)]
fn tile<W: Work, const R: usize, const C: usize>(
    into: &mut [W],
    a: &[W],
    b: &[W],
    [wide, deep, under]: [usize; 3],
    depth: usize,
) -> usize {
    let rows: [&[W]; R] = std::array::from_fn(|r| &a[r * deep..][..depth]);
    let b = &b[..(depth - 1) * under + C];
    let mut sums = [[W::ZERO; C]; R];
    for k in 0..depth {
        // A copy, which stays in registers.
        let mut lanes = [W::ZERO; C];
        lanes.copy_from_slice(&b[k * under..][..C]);
        for r in 0..R {
            let a = rows[r][k];
            for c in 0..C {
                sums[r][c] = sums[r][c] + a * lanes[c];
            }
        }
    }
    for r in 0..R {
        let into = &mut into[r * wide..][..C];
        for c in 0..C {
            into[c] = into[c] + sums[r][c];
        }
    }
    R
}

/// Turns the sign of every element whose bit of the generator is set: element `i` has bit `i % 32` of word `i / 32 % 4` at counter `i / 128`.
#[inline(always)]
pub fn flip<W: Work>(values: &mut [W], generator: crate::philox::Philox, from: u64) {
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
pub fn normal<W: Work>(into: &mut [W], generator: crate::philox::Philox, from: u64, scale: f64) {
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

/// `x = x - base`; the largest magnitude of the result.
#[inline(always)]
pub fn less<W: Work>(x: &mut [W], base: &[W]) -> W::Magnitude {
    let mut largest = W::Magnitude::default();
    for (x, &b) in x.iter_mut().zip(base) {
        let d = *x - b;
        largest = largest.max(d.magnitude());
        *x = d;
    }
    largest
}

/// `into = x - base` for a pair of one format; the largest magnitude of the result.
#[inline(always)]
pub fn apart<E: Element, W: Work>(into: &mut [W], pair: [&[u8]; 2]) -> W::Magnitude {
    let mut largest = W::Magnitude::default();
    for ((into, x), b) in into.iter_mut().zip(elements::<E>(pair[0])).zip(elements::<E>(pair[1])) {
        let d = W::widen(x) - W::widen(b);
        largest = largest.max(d.magnitude());
        *into = d;
    }
    largest
}

/// Which magnitudes stay, and what they are multiplied by.
#[derive(Debug, Clone, Copy)]
pub struct Band<W: Work> {
    /// From this.
    pub floor: W::Magnitude,
    /// To just below this.
    pub ceiling: W::Magnitude,
    /// Times this.
    pub c: W,
}

/// `into = c * d` where the magnitude of `d = x - base` is in the band, else zero; `sum = sum + into`, from zero when `first`. The largest
/// magnitude of `d`.
#[inline(always)]
pub fn keep_apart<E: Element, W: Work>(
    into: &mut [W],
    sum: &mut [W],
    pair: [&[u8]; 2],
    band: Band<W>,
    first: bool,
) -> W::Magnitude {
    let Band { floor, ceiling, c } = band;
    let mut largest = W::Magnitude::default();
    let pairs = elements::<E>(pair[0]).zip(elements::<E>(pair[1]));
    for ((into, sum), (x, b)) in into.iter_mut().zip(sum).zip(pairs) {
        let d = W::widen(x) - W::widen(b);
        let key = d.magnitude();
        largest = largest.max(key);
        let kept = if (key >= floor) & (key < ceiling) { c * d } else { W::ZERO };
        *into = kept;
        *sum = if first { W::ZERO } else { *sum } + kept;
    }
    largest
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

/// How many magnitudes of `x - base` equal `key`, for a pair of one format.
#[inline(always)]
pub fn count_equal_apart<E: Element, W: Work>(pair: [&[u8]; 2], key: W::Magnitude) -> u64 {
    let mut equal = 0u32;
    for (x, b) in elements::<E>(pair[0]).zip(elements::<E>(pair[1])) {
        equal += u32::from((W::widen(x) - W::widen(b)).magnitude() == key);
    }
    u64::from(equal)
}

/// The largest magnitude.
#[inline(always)]
pub fn largest<W: Work>(x: &[W]) -> W::Magnitude {
    x.iter().fold(W::Magnitude::default(), |largest, x| largest.max(x.magnitude()))
}

/// Sets a bit for every element whose magnitude is from `lo` to `hi`; how many are above.
#[inline(always)]
pub fn sift<W: Work>(bits: &mut [u64], x: &[W], lo: W::Magnitude, hi: W::Magnitude) -> u64 {
    let mut above = 0u32;
    for x in x {
        above += u32::from(x.magnitude() > hi);
    }
    for (word, x) in bits.iter_mut().zip(x.chunks(64)) {
        *word = 0;
        if let Some(x) = x.first_chunk::<64>() {
            let mut found = 0u64;
            for (j, x) in x.iter().enumerate() {
                let key = x.magnitude();
                found |= u64::from((key >= lo) & (key <= hi)) << j;
            }
            *word = found;
        } else {
            for (j, x) in x.iter().enumerate() {
                let key = x.magnitude();
                *word |= u64::from((key >= lo) & (key <= hi)) << j;
            }
        }
    }
    u64::from(above)
}

/// How many magnitudes equal `key`.
#[inline(always)]
pub fn count_equal<W: Work>(x: &[W], key: W::Magnitude) -> u64 {
    let mut equal = 0u32;
    for x in x {
        equal += u32::from(x.magnitude() == key);
    }
    u64::from(equal)
}

/// Keeps what has a magnitude from `floor` to just below `ceiling`; the rest becomes zero.
#[inline(always)]
pub fn trim<W: Work>(x: &mut [W], floor: W::Magnitude, ceiling: W::Magnitude) {
    for x in x {
        let key = x.magnitude();
        *x = if (key >= floor) & (key < ceiling) { *x } else { W::ZERO };
    }
}

/// `x = c * x` where the magnitude is in the band, else zero; and `sum = sum + x`, from zero when `first`.
#[inline(always)]
pub fn keep_scaled<W: Work>(x: &mut [W], sum: &mut [W], band: Band<W>, first: bool) {
    let Band { floor, ceiling, c } = band;
    for (x, sum) in x.iter_mut().zip(sum) {
        let key = x.magnitude();
        let kept = if (key >= floor) & (key < ceiling) { c * *x } else { W::ZERO };
        *x = kept;
        *sum = if first { W::ZERO } else { *sum } + kept;
    }
}

/// `x = x / share` where the word is not above `last` and there is a share, else zero.
#[inline(always)]
pub fn keep_drawn<W: Work>(x: &mut [W], words: &[u32], last: &[u32], share: &[W]) {
    for (((x, &word), &last), &share) in x.iter_mut().zip(words).zip(last).zip(share) {
        *x = if (word <= last) & (share > W::ZERO) { *x / share } else { W::ZERO };
    }
}

/// Magnitudes of an f32 as keys; the largest.
#[inline(always)]
pub fn keys<W: Work>(into: &mut [u32], x: &[W]) -> u32 {
    let mut largest = 0;
    for (into, x) in into.iter_mut().zip(x) {
        let key: u64 = x.magnitude().into();
        *into = key as u32;
        largest = largest.max(key as u32);
    }
    largest
}

/// Turns keys into buckets: 0 for zeros, 1 for what is not above `lowest`, one more for every `1 << shift` keys from there. Sets a bit in `some` for each that is
/// no zero, and in `odd` for each that may share its bucket with other keys. Whole groups of 64.
#[inline(always)]
pub fn buckets(keys: &mut [u32], some: &mut [u64], odd: &mut [u64], shift: u32, lowest: u32) {
    let rest = (1u32 << shift) - 1;
    let groups = keys.as_chunks_mut::<64>().0.iter_mut();
    for ((keys, some), odd) in groups.zip(some).zip(odd) {
        let (mut found, mut between) = (0u64, 0u64);
        for (j, &key) in keys.iter().enumerate() {
            found |= u64::from(key != 0) << j;
        }
        for (j, &key) in keys.iter().enumerate() {
            between |= u64::from((key != 0) & ((key & rest != 0) | (key >> shift < lowest))) << j;
        }
        for key in keys.iter_mut() {
            let bucket = (*key >> shift).max(lowest) - lowest + 1;
            *key = if *key == 0 { 0 } else { bucket };
        }
        (*some, *odd) = (found, between);
    }
}

/// Rounded to a format, and widened again.
#[inline(always)]
pub fn round<E: Element, W: Work>(x: &mut [W]) {
    for x in x {
        *x = W::widen(x.narrow::<E>());
    }
}

/// The indices of set bits.
#[inline(always)]
fn each_set(bits: &[u64], mut with: impl FnMut(usize)) {
    for (i, &word) in bits.iter().enumerate() {
        let mut left = word;
        while left != 0 {
            with(i * 64 + left.trailing_zeros() as usize);
            left &= left - 1;
        }
    }
}

/// Counts buckets, of the elements whose bit is set.
#[inline(always)]
pub fn tally(counts: &mut [u32], buckets: &[u32], some: &[u64]) {
    each_set(some, |i| counts[buckets[i] as usize] += 1);
}

/// What [`mark`] sets.
const MARK: u32 = 1 << 31;

/// Marks the buckets of the elements whose bit is set.
#[inline(always)]
pub fn mark(counts: &mut [u32], buckets: &[u32], odd: &[u64]) {
    each_set(odd, |i| counts[buckets[i] as usize] |= MARK);
}

/// Gives each element whose bit is set the next number of its bucket, and lists those in marked buckets, for which there must be room for one more than
/// there are. How many those are.
#[inline(always)]
pub fn rank(ranks: &mut [u32], mixed: &mut [u32], counts: &mut [u32], buckets: &[u32], some: &[u64]) -> usize {
    let mut found = 0;
    each_set(some, |i| {
        let next = &mut counts[buckets[i] as usize];
        let rank = *next;
        *next = rank + 1;
        ranks[i] = rank & (MARK - 1);
        mixed[found] = i as u32;
        found += (rank / MARK) as usize;
    });
    found
}

/// `into = y - x`.
#[inline(always)]
pub fn minus(into: &mut [f64], y: &[f64], x: &[f64]) {
    for ((into, &y), &x) in into.iter_mut().zip(y).zip(x) {
        *into = y - x;
    }
}

/// The largest number; what is not a number does not count.
#[inline(always)]
pub fn highest(x: &[f64]) -> f64 {
    let mut lanes = [f64::NEG_INFINITY; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for x in whole {
        for j in 0..LANES {
            lanes[j] = if x[j] > lanes[j] { x[j] } else { lanes[j] };
        }
    }
    lanes.iter().chain(rest).fold(f64::NEG_INFINITY, |m, &x| if x > m { x } else { m })
}

/// Widens to f64.
#[inline(always)]
pub fn double<W: Work>(into: &mut [f64], x: &[W]) {
    for (into, x) in into.iter_mut().zip(x) {
        *into = x.to_f64();
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
pub fn words(into: &mut [u32], generator: crate::philox::Philox, from: u64) {
    let (whole, rest) = into.as_chunks_mut::<4>();
    generator.words_from(from / 4, whole);
    if !rest.is_empty() {
        let last = generator.words(from / 4 + whole.len() as u64);
        rest.copy_from_slice(&last[..rest.len()]);
    }
}

/// `x = c * x`.
#[inline(always)]
pub fn scale<W: Work>(x: &mut [W], c: W) {
    for x in x {
        *x = c * *x;
    }
}

/// `acc = acc + x`.
#[inline(always)]
pub fn add<W: Work>(acc: &mut [W], x: &[W]) {
    for (acc, &x) in acc.iter_mut().zip(x) {
        *acc = *acc + x;
    }
}

/// Where `x` has the sign of `sign` (zero counts as positive there, and as neither in `x`): `acc = acc + x` and `share = share + w`, both from
/// zero when `first`.
#[inline(always)]
pub fn add_agreeing<W: Work>(acc: &mut [W], share: &mut [W], x: &[W], sign: &[W], w: W, first: bool) {
    for (((acc, share), &x), &sign) in acc.iter_mut().zip(share).zip(x).zip(sign) {
        let positive = (x > W::ZERO) & (sign >= W::ZERO);
        let negative = (x < W::ZERO) & (sign < W::ZERO);
        let agrees = positive | negative;
        *acc = if first { W::ZERO } else { *acc } + if agrees { x } else { W::ZERO };
        *share = if first { W::ZERO } else { *share } + if agrees { w } else { W::ZERO };
    }
}

/// `acc = c * (acc / share)`, but `c * acc` where the magnitude of `share` is below `least`.
#[inline(always)]
pub fn divide<W: Work>(acc: &mut [W], share: &[W], least: W, c: W) {
    for (acc, &share) in acc.iter_mut().zip(share) {
        let by = if share.abs() < least { W::from_f64(1.0) } else { share };
        *acc = c * (*acc / by);
    }
}

/// `into = |x|`.
#[inline(always)]
pub fn absolute<W: Work>(into: &mut [W], x: &[W]) {
    for (into, x) in into.iter_mut().zip(x) {
        *into = x.abs();
    }
}

/// `acc = c * v`, or `acc + c * v` when not `first`, with a coefficient for each element, rounded once.
#[inline(always)]
pub fn scaled_each<W: Work>(acc: &mut [W], v: &[W], c: &[f64], first: bool) {
    for ((acc, &v), &c) in acc.iter_mut().zip(v).zip(c) {
        let value = W::from_f64(c) * v;
        *acc = if first { value } else { *acc + value };
    }
}

/// `sums = sums + a * b`: the product in the work type, the sum in f64.
#[inline(always)]
pub fn add_products_each<W: Work>(sums: &mut [f64], a: &[W], b: &[W]) {
    for ((sum, &a), &b) in sums.iter_mut().zip(a).zip(b) {
        *sum += (a * b).to_f64();
    }
}

/// `x = exp(x - m)`, for `m` not below any `x`: `x - m = k ln 2 + r`, the series of `exp r`, and `k` into the exponent. What would be subnormal is zero.
#[inline(always)]
pub fn exp_less(x: &mut [f64], m: f64) {
    const SERIES: [f64; 14] = [
        1.0 / 6_227_020_800.0,
        1.0 / 479_001_600.0,
        1.0 / 39_916_800.0,
        1.0 / 3_628_800.0,
        1.0 / 362_880.0,
        1.0 / 40_320.0,
        1.0 / 5_040.0,
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        1.0 / 2.0,
        1.0,
        1.0,
    ];
    for x in x {
        let y = *x - m;
        let k = (y * std::f64::consts::LOG2_E + 0.5).floor();
        let r = (y - k * 0.693_147_180_369_123_8) - k * 1.908_214_929_270_587_7e-10;
        let mut p = SERIES[0];
        for c in &SERIES[1..] {
            p = p * r + c;
        }
        // A number from 2^52 on has its integer in its lowest bits.
        let biased = (if k > -1022.0 { k } else { -1022.0 }) + 1023.0 + 4_503_599_627_370_496.0;
        let power = f64::from_bits(biased.to_bits() << 52);
        *x = if k < -1021.0 { 0.0 } else { p * power };
    }
}

/// `into = (x_1 - mean)^2 + (x_2 - mean)^2 + ...` with `mean = (x_1 + x_2 + ...) / n`, for the elements of some inputs from `at` on.
#[inline(always)]
pub fn spread<W: Work>(into: &mut [W], inputs: &[Vec<W>], at: usize) {
    let n = W::from_f64(inputs.len() as f64);
    let (whole, rest) = into.as_chunks_mut::<LANES>();
    let last = at + whole.len() * LANES;
    for (g, into) in whole.iter_mut().enumerate() {
        let from = at + g * LANES;
        let (mut mean, mut sum) = ([W::ZERO; LANES], [W::ZERO; LANES]);
        for x in inputs {
            let x = &x[from..from + LANES];
            for j in 0..LANES {
                mean[j] = mean[j] + x[j];
            }
        }
        for mean in &mut mean {
            *mean = *mean / n;
        }
        for x in inputs {
            let x = &x[from..from + LANES];
            for j in 0..LANES {
                let off = x[j] - mean[j];
                sum[j] = sum[j] + off * off;
            }
        }
        *into = sum;
    }
    for (i, into) in rest.iter_mut().enumerate() {
        let mean = inputs.iter().fold(W::ZERO, |sum, x| sum + x[last + i]) / n;
        let square = |x: &Vec<W>| (x[last + i] - mean) * (x[last + i] - mean);
        *into = inputs.iter().fold(W::ZERO, |sum, x| sum + square(x));
    }
}

/// Counts, element by element, whose magnitude is above a bound.
#[inline(always)]
pub fn count_moved<W: Work>(count: &mut [W], x: &[W], bound: W) {
    for (count, &x) in count.iter_mut().zip(x) {
        *count = *count + if x.abs() > bound { W::from_f64(1.0) } else { W::ZERO };
    }
}

/// Of the elements above a bound: those that nobody else moved, and those that others moved too.
#[inline(always)]
pub fn count_alone<W: Work>(count: &[W], x: &[W], bound: W) -> (u64, u64) {
    let one = W::from_f64(1.0);
    let (mut alone, mut shared) = (0u32, 0u32);
    for (&count, &x) in count.iter().zip(x) {
        let moved = x.abs() > bound;
        alone += u32::from(moved & (count == one));
        shared += u32::from(moved & (count != one));
    }
    (u64::from(alone), u64::from(shared))
}

/// `acc = acc + x` where `x` is above a bound, enlarged where nobody else moved.
#[inline(always)]
pub fn add_moved<W: Work>(acc: &mut [W], x: &[W], count: &[W], bound: W, factor: W) {
    let one = W::from_f64(1.0);
    for ((acc, &x), &count) in acc.iter_mut().zip(x).zip(count) {
        let scale = if count == one { factor } else { one };
        *acc = if x.abs() > bound { *acc + scale * x } else { *acc };
    }
}

/// `acc = acc / max(count, 1)`.
#[inline(always)]
pub fn divide_by_count<W: Work>(acc: &mut [W], count: &[W]) {
    let one = W::from_f64(1.0);
    for (acc, &count) in acc.iter_mut().zip(count) {
        *acc = *acc / if count > one { count } else { one };
    }
}

/// Keeps what has the sign of `sign`, zero counting as positive there; the rest becomes zero.
#[inline(always)]
pub fn keep_agreeing<W: Work>(x: &mut [W], sign: &[W]) {
    for (x, &sign) in x.iter_mut().zip(sign) {
        let agrees = if sign >= W::ZERO { *x > W::ZERO } else { *x < W::ZERO };
        *x = if agrees { *x } else { W::ZERO };
    }
}

/// Keeps `x` where `other` has a magnitude of at least `floor`; the rest becomes zero.
#[inline(always)]
pub fn keep_where<W: Work>(x: &mut [W], other: &[W], floor: W::Magnitude) {
    for (x, other) in x.iter_mut().zip(other) {
        *x = if other.magnitude() >= floor { *x } else { W::ZERO };
    }
}

/// `u = b` where `|b - a| <= t`, else `a + t` or `a - t`, towards `b`.
#[inline(always)]
pub fn nearer<W: Work>(u: &mut [W], a: &[W], b: &[W], t: W) {
    for ((u, &a), &b) in u.iter_mut().zip(a).zip(b) {
        let d = b - a;
        let step = if d < W::ZERO { W::ZERO - t } else { t };
        *u = if d.abs() <= t { b } else { a + step };
    }
}

/// `into = |x| * c`: the product in f64, rounded once.
#[inline(always)]
pub fn weigh<W: Work>(into: &mut [W], x: &[W], c: f64) {
    for (into, x) in into.iter_mut().zip(x) {
        *into = W::from_f64(x.abs().to_f64() * c);
    }
}

/// Rows of a panel of [`multiply_panels`]: those of its tallest register tile.
pub const PANEL: usize = 12;

/// [`multiply`] of an `a` in panels of [`PANEL`] rows, of which the stride is that of `a`, and in which columns lie one behind the other: what goes
/// through a tile comes from memory in order, and rows of any length share no place in the cache. The last panel is as long as the others.
#[inline(always)]
pub fn multiply_panels(into: &mut [f64], a: &[f64], b: &[f64], strides: [usize; 3], size: [usize; 3], tall: usize) {
    match tall {
        12.. => panels::<12>(into, a, b, strides, size),
        6.. => panels::<4>(into, a, b, strides, size),
        _ => panels::<2>(into, a, b, strides, size),
    }
}

/// Columns of a register tile of [`multiply_panels`].
const WIDTH: usize = 8;

/// [`multiply_panels`] in tiles of `R` rows, and smaller ones at the edges.
#[inline(always)]
fn panels<const R: usize>(
    into: &mut [f64],
    a: &[f64],
    b: &[f64],
    [wide, apart, under]: [usize; 3],
    [rows, depth, columns]: [usize; 3],
) {
    if depth == 0 {
        return;
    }
    let whole = columns - columns % WIDTH;
    for j in (0..whole).step_by(WIDTH) {
        let b = &b[j..];
        let mut i = 0;
        while i < rows {
            let (into, a) = (&mut into[i * wide + j..], &a[i / PANEL * apart + i % PANEL..]);
            i += match (rows - i).min(PANEL - i % PANEL) {
                left if left >= R => panel_tile::<R>(into, a, b, [wide, under], depth),
                4.. => panel_tile::<4>(into, a, b, [wide, under], depth),
                2.. => panel_tile::<2>(into, a, b, [wide, under], depth),
                _ => panel_tile::<1>(into, a, b, [wide, under], depth),
            };
        }
    }
    if whole < columns {
        let width = columns - whole;
        for i in 0..rows {
            let mut sums = [0.0; WIDTH];
            let sums = &mut sums[..width];
            let a = &a[i / PANEL * apart + i % PANEL..];
            for k in 0..depth {
                for (s, &b) in sums.iter_mut().zip(&b[k * under + whole..][..width]) {
                    *s += a[k * PANEL] * b;
                }
            }
            for (o, &s) in into[i * wide + whole..][..width].iter_mut().zip(&*sums) {
                *o += s;
            }
        }
    }
}

/// As [`tile`]. Compilers are not to know that the rows of a panel are neighbours: they would take those for lanes, and then keep sums in memory.
#[inline(always)]
fn panel_tile<const R: usize>(
    into: &mut [f64],
    a: &[f64],
    b: &[f64],
    [wide, under]: [usize; 2],
    depth: usize,
) -> usize {
    let next = std::hint::black_box(1);
    let rows: [&[f64]; R] = std::array::from_fn(|r| &a[r * next..][..(depth - 1) * PANEL + 1]);
    let b = &b[..(depth - 1) * under + WIDTH];
    let mut sums = [[0.0; WIDTH]; R];
    for k in 0..depth {
        let mut lanes = [0.0; WIDTH];
        lanes.copy_from_slice(&b[k * under..][..WIDTH]);
        for r in 0..R {
            let a = rows[r][k * PANEL];
            for c in 0..WIDTH {
                sums[r][c] += a * lanes[c];
            }
        }
    }
    for r in 0..R {
        let into = &mut into[r * wide..][..WIDTH];
        for c in 0..WIDTH {
            into[c] += sums[r][c];
        }
    }
    R
}
