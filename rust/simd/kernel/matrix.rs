//! Products of small panels and turns of their rows.

use crate::bf16::Work;

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

/// `into[i][..columns] += sum over k of a[k][i] * b[k][..columns]`: [`multiply`] by a transpose, which nobody has to make. Rows of `into`, `a` and `b`
/// are `strides` apart; the size is that of the result and the depth. The same bits as those of [`multiply`].
#[inline(always)]
pub fn cross<W: Work>(into: &mut [W], a: &[W], b: &[W], strides: [usize; 3], size: [usize; 3], tall: usize) {
    // Taller than those of `multiply`: what a tile takes from `a` lies side by side.
    match (size_of::<W>() > 4, tall) {
        (true, 12..) => crosses::<W, 16, 8>(into, a, b, strides, size),
        (true, 6..) => crosses::<W, 4, 8>(into, a, b, strides, size),
        (true, _) => crosses::<W, 2, 8>(into, a, b, strides, size),
        (false, 12..) => crosses::<W, 16, 16>(into, a, b, strides, size),
        (false, 6..) => crosses::<W, 4, 16>(into, a, b, strides, size),
        (false, _) => crosses::<W, 2, 8>(into, a, b, strides, size),
    }
}

/// [`cross`] in tiles of `R` rows and `C` columns, and smaller ones at the edges.
#[inline(always)]
fn crosses<W: Work, const R: usize, const C: usize>(
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
            let (into, a) = (&mut into[i * strides[0] + j..], &a[i..]);
            i += match rows - i {
                left if left >= R => cross_tile::<W, R, C>(into, a, b, strides, depth),
                4.. => cross_tile::<W, 4, C>(into, a, b, strides, depth),
                2.. => cross_tile::<W, 2, C>(into, a, b, strides, depth),
                _ => cross_tile::<W, 1, C>(into, a, b, strides, depth),
            };
        }
    }
    if whole < columns {
        let width = columns - whole;
        for i in 0..rows {
            let mut sums = [W::ZERO; C];
            let sums = &mut sums[..width];
            for k in 0..depth {
                let a = a[k * strides[1] + i];
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

/// As the tiles of [`multiply`]. Compilers are not to know that what is taken from `a` are neighbours: they would take those for lanes, and then keep sums in
/// memory.
#[inline(always)]
fn cross_tile<W: Work, const R: usize, const C: usize>(
    into: &mut [W],
    a: &[W],
    b: &[W],
    [wide, deep, under]: [usize; 3],
    depth: usize,
) -> usize {
    let next = std::hint::black_box(1);
    let rows: [&[W]; R] = std::array::from_fn(|r| &a[r * next..][..(depth - 1) * deep + 1]);
    let b = &b[..(depth - 1) * under + C];
    let mut sums = [[W::ZERO; C]; R];
    for k in 0..depth {
        let mut lanes = [W::ZERO; C];
        lanes.copy_from_slice(&b[k * under..][..C]);
        for r in 0..R {
            let a = rows[r][k * deep];
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
