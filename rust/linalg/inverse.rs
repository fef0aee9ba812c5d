//! The smallest eigenpairs of a symmetric positive matrix in memory: block Krylov iteration on its shifted inverse.
//!
//! A full eigendecomposition of a matrix of thousands of rows is bound by memory (its reduction goes through the whole matrix once a column), while a
//! Cholesky factorisation is made of products, and a few dozen eigenpairs need a few dozen solves with it.
//!
//! Blocks are as wide as there are wanted vectors: wide enough for every copy of an eigenvalue that is there many times, and no wider, because a
//! Krylov space finds more the longer it is for its size. When the space is full it is cut down to its best vectors and grows on from there
//! (the thick restart of Wu and Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM J. Matrix Anal. Appl. 2000), which
//! loses next to nothing.

use std::sync::{Mutex, PoisonError};

use super::dense::{cholesky, cross, invert_triangle, orthonormalise_by, share, transpose};
use super::eigen::symmetric_until;
use super::whole;
use crate::philox::Philox;
use crate::simd::Level;
use crate::simd::dispatch::{self, PANEL};
use crate::stream::Control;
use crate::{Error, Result};

/// Rows of a block of the factorisation, and products that are summed before sums are joined.
const NB: usize = 8 * PANEL;
/// Wanted vectors, and those beside them, are rounded up to this.
const STRIP: usize = 16;
/// Columns of a register tile.
const TILE: usize = 8;
/// Blocks of the Krylov space beyond the vectors it begins with, before it is cut down to them again.
const LENGTH: usize = 6;
/// Blocks that say where to put the shift.
const FIRST: usize = 3;
/// Cycles before the whole problem is solved instead.
const CYCLES: usize = 24;
/// The angle at which a vector lies in the span.
const CLOSE: f64 = 1e-11;

/// `a - shift = l l^T`, in blocks that are packed in panels: [`dispatch::multiply_panels`].
struct Factor {
    n: usize,
    /// Of each row of blocks, those of `l` left of the diagonal.
    lower: Vec<Vec<Vec<f64>>>,
    /// Of each row of blocks, those of `l^T` right of the diagonal.
    upper: Vec<Vec<Vec<f64>>>,
    /// The inverses of the blocks of `l` on the diagonal, and those of `l^T`.
    inverses: Vec<[Vec<f64>; 2]>,
}

/// Packs `rows x depth` elements, which are found by row and column, in panels.
fn panels(rows: usize, depth: usize, at: impl Fn(usize, usize) -> f64) -> Vec<f64> {
    let mut into = vec![0.0; rows.next_multiple_of(PANEL) * depth];
    for (p, panel) in into.chunks_exact_mut(PANEL * depth).enumerate() {
        let here = PANEL.min(rows - p * PANEL);
        for (k, column) in panel.chunks_exact_mut(PANEL).enumerate() {
            column[..here].iter_mut().enumerate().for_each(|(r, x)| *x = at(p * PANEL + r, k));
        }
    }
    into
}

impl Factor {
    /// Nothing if the shifted matrix is not positive.
    fn new(level: Level, threads: usize, a: &[f64], n: usize, shift: f64, control: &Control) -> Result<Option<Self>> {
        let count = n.div_ceil(NB);
        let size = |i: usize| NB.min(n - i * NB);
        let mut lower: Vec<Vec<Vec<f64>>> = vec![vec![]; count];
        let mut upper: Vec<Vec<Vec<f64>>> = vec![vec![]; count];
        let mut inverses = Vec::with_capacity(count);
        for j in 0..count {
            if control.cancelled() {
                return Err(Error::Cancelled);
            }
            let width = size(j);
            // The row of blocks left of the diagonal, transposed.
            let mut across = vec![0.0; j * NB * width];
            for (block, into) in lower[j].iter().zip(across.chunks_exact_mut(NB * width)) {
                for (p, panel) in block.chunks_exact(PANEL * NB).enumerate() {
                    for (column, into) in panel.chunks_exact(PANEL).zip(into.chunks_exact_mut(width)) {
                        let into = &mut into[p * PANEL..];
                        let here = PANEL.min(into.len());
                        into[..here].copy_from_slice(&column[..here]);
                    }
                }
            }
            // A block of the column, less what the columns before take from it.
            let rest = |i: usize| {
                let mut sums = vec![0.0; size(i) * width];
                for (block, b) in lower[i].iter().zip(across.chunks_exact(NB * width)) {
                    let shape = [size(i), NB, width];
                    dispatch::multiply_panels(
                        level,
                        &mut sums,
                        block,
                        b,
                        [width, PANEL * NB, width],
                        shape,
                        level.tall(),
                    );
                }
                for (r, row) in sums.chunks_exact_mut(width).enumerate() {
                    row.iter_mut().zip(&a[(i * NB + r) * n + j * NB..]).for_each(|(s, a)| *s = a - *s);
                }
                sums
            };
            let mut block = rest(j);
            block.iter_mut().step_by(width + 1).for_each(|x| *x -= shift);
            // `r` is the transposed factor; the inverse of the factor itself is the transposed inverse of `r`.
            let Some(r) = cholesky(&block, width, 1e-15) else { return Ok(None) };
            let turned = invert_triangle(&r, width);
            let mut inverse = vec![0.0; width * width];
            transpose(&turned, &mut inverse, width, width);
            let slots: Vec<Mutex<[Vec<f64>; 2]>> = (j + 1..count).map(|_| Mutex::default()).collect();
            share(threads, slots.len(), |s| {
                let i = j + 1 + s;
                let (left, high) = (rest(i), size(i));
                let mut l = vec![0.0; high * width];
                dispatch::multiply(level, &mut l, &left, &turned, [width; 3], [high, width, width], level.tall());
                let both = [panels(high, width, |r, k| l[r * width + k]), panels(width, high, |r, k| l[k * width + r])];
                *slots[s].lock().unwrap_or_else(PoisonError::into_inner) = both;
            });
            for (s, slot) in slots.into_iter().enumerate() {
                let [left, right] = slot.into_inner().unwrap_or_else(PoisonError::into_inner);
                lower[j + 1 + s].push(left);
                upper[j].push(right);
            }
            inverses.push([inverse, turned]);
        }
        Ok(Some(Self { n, lower, upper, inverses }))
    }

    /// `(a - shift)^-1 x` for `n x b`, some columns apart.
    fn solve(&self, level: Level, threads: usize, x: &[f64], b: usize) -> Vec<f64> {
        let n = self.n;
        // As many columns together as leave work for every thread: the factor is read once for all of them.
        let wide = b.div_ceil(threads.max(1)).next_multiple_of(TILE);
        let strips: Vec<Mutex<Vec<f64>>> = (0..b)
            .step_by(wide)
            .map(|from| {
                let width = wide.min(b - from);
                Mutex::new(x.chunks_exact(b).flat_map(|row| &row[from..from + width]).copied().collect())
            })
            .collect();
        share(threads, strips.len(), |s| {
            let mut y = strips[s].lock().unwrap_or_else(PoisonError::into_inner);
            let width = y.len() / n;
            for (i, [inverse, _]) in self.inverses.iter().enumerate() {
                substitute(level, &mut y, width, i, inverse, &self.lower[i], 0);
            }
            for (i, [_, inverse]) in self.inverses.iter().enumerate().rev() {
                substitute(level, &mut y, width, i, inverse, &self.upper[i], i + 1);
            }
        });
        let mut out = vec![0.0; n * b];
        for (s, strip) in strips.into_iter().enumerate() {
            let strip = strip.into_inner().unwrap_or_else(PoisonError::into_inner);
            let width = strip.len() / n;
            for (into, from) in out.chunks_exact_mut(b).zip(strip.chunks_exact(width)) {
                into[s * wide..][..width].copy_from_slice(from);
            }
        }
        out
    }
}

/// One block of a substitution: what the solved rows take from it (from block `first` on), then the block on the diagonal.
fn substitute(level: Level, y: &mut [f64], width: usize, i: usize, by: &[f64], blocks: &[Vec<f64>], first: usize) {
    let size = by.len().isqrt();
    let mut sums = vec![0.0; size * width];
    for (block, solved) in blocks.iter().zip(y.chunks(NB * width).skip(first)) {
        let depth = solved.len() / width;
        let shape = [size, depth, width];
        dispatch::multiply_panels(level, &mut sums, block, solved, [width, PANEL * depth, width], shape, level.tall());
    }
    let block = &mut y[i * NB * width..][..size * width];
    for (s, y) in sums.iter_mut().zip(&*block) {
        *s = *y - *s;
    }
    block.fill(0.0);
    dispatch::multiply(level, block, by, &sums, [width, size, width], [size, size, width], level.tall());
}

/// Orthonormal vectors that grow in number, packed both ways.
struct Basis {
    n: usize,
    /// How many there is room for.
    room: usize,
    /// How many there are.
    count: usize,
    /// Vectors as rows, in panels of vectors.
    rows: Vec<f64>,
    /// Vectors as columns, in panels of elements.
    columns: Vec<f64>,
}

impl Basis {
    fn new(n: usize, room: usize) -> Self {
        let rows = vec![0.0; room.next_multiple_of(PANEL) * n];
        Self { n, room, count: 0, rows, columns: vec![0.0; n.next_multiple_of(PANEL) * room] }
    }

    /// Takes up the columns of `x`, `b` a row.
    fn push(&mut self, x: &[f64], b: usize) {
        for (i, row) in x.chunks_exact(b).enumerate() {
            for (v, &x) in (self.count..).zip(row) {
                self.rows[(v / PANEL * self.n + i) * PANEL + v % PANEL] = x;
                self.columns[(i / PANEL * self.room + v) * PANEL + i % PANEL] = x;
            }
        }
        self.count += b;
    }

    /// What `w` (`n x b`) has of each of the vectors: `count x b`.
    fn shares(&self, level: Level, threads: usize, w: &[f64], b: usize) -> Vec<f64> {
        // Few rows a thread: there are few of them.
        const ROWS: usize = 2 * PANEL;
        let mut shares = vec![0.0; self.count * b];
        let slots: Vec<Mutex<&mut [f64]>> = shares.chunks_mut(ROWS * b).map(Mutex::new).collect();
        share(threads, slots.len(), |s| {
            let mut slot = slots[s].lock().unwrap_or_else(PoisonError::into_inner);
            let rows = slot.len() / b;
            let a = &self.rows[s * ROWS * self.n..];
            for (i, part) in w.chunks(NB * b).enumerate() {
                let shape = [rows, part.len() / b, b];
                let a = &a[i * NB * PANEL..];
                dispatch::multiply_panels(level, &mut slot, a, part, [b, PANEL * self.n, b], shape, level.tall());
            }
        });
        drop(slots);
        shares
    }

    /// `w` (`n x b`) and these sums of vectors: `by` is `count x b`.
    fn add(&self, level: Level, threads: usize, w: &mut [f64], by: &[f64], b: usize) {
        let slots: Vec<Mutex<&mut [f64]>> = w.chunks_mut(NB * b).map(Mutex::new).collect();
        share(threads, slots.len(), |s| {
            let mut slot = slots[s].lock().unwrap_or_else(PoisonError::into_inner);
            let rows = slot.len() / b;
            let a = &self.columns[s * NB * self.room..];
            for (k, part) in by.chunks(NB * b).enumerate() {
                let shape = [rows, part.len() / b, b];
                let a = &a[k * NB * PANEL..];
                dispatch::multiply_panels(level, &mut slot, a, part, [b, PANEL * self.room, b], shape, level.tall());
            }
        });
    }

    /// Takes from `w` (`n x b`) what it has of the vectors; what that was.
    fn project(&self, level: Level, threads: usize, w: &mut [f64], b: usize) -> Vec<f64> {
        let mut shares = self.shares(level, threads, w, b);
        shares.iter_mut().for_each(|x| *x = -*x);
        self.add(level, threads, w, &shares, b);
        shares.iter_mut().for_each(|x| *x = -*x);
        shares
    }
}

/// A Krylov space of an inverse: `inverse basis = basis projection + block last`, of which `last` is zero but for the block before.
struct Space {
    basis: Basis,
    /// `room x room`.
    projection: Vec<f64>,
    /// The block that comes next, `n x p`, orthonormal and orthogonal to the basis.
    block: Vec<f64>,
    p: usize,
    /// What the image of the block before has of the one that comes next, `p x p`.
    last: Vec<f64>,
    /// Random numbers used up.
    drawn: u64,
}

/// What a cycle of the iteration found: the largest eigenvalues of the inverse, descending, their vectors as columns, and of each wanted one how far
/// its image leaves the span of all of them.
struct Found {
    values: Vec<f64>,
    vectors: Vec<f64>,
    leaks: Vec<f64>,
}

impl Space {
    fn new(n: usize, p: usize, room: usize) -> Self {
        let (basis, projection) = (Basis::new(n, room), vec![0.0; room * room]);
        Self { basis, projection, block: vec![], p, last: vec![], drawn: 0 }
    }

    /// Begins with a block.
    fn start(&mut self, level: Level, threads: usize, block: Vec<f64>, fresh: Philox) {
        self.basis.count = 0;
        self.block = block;
        orthonormalise_by(level, threads, &mut self.block, self.p, (fresh, &mut self.drawn), |_| ());
    }

    /// One block more.
    fn grow(&mut self, level: Level, threads: usize, factor: &Factor, fresh: Philox) {
        let (p, room, from) = (self.p, self.basis.room, self.basis.count);
        let mut image = factor.solve(level, threads, &self.block, p);
        self.basis.push(&self.block, p);
        let shares = self.basis.project(level, threads, &mut image, p);
        for (i, row) in shares.chunks_exact(p).enumerate() {
            for (j, &x) in (from..).zip(row) {
                self.projection[i * room + j] = x;
                self.projection[j * room + i] = x;
            }
        }
        self.block.clone_from(&image);
        let (basis, mut first) = (&self.basis, true);
        orthonormalise_by(level, threads, &mut self.block, p, (fresh, &mut self.drawn), |w| {
            // That has been done.
            if !std::mem::take(&mut first) {
                basis.project(level, threads, w, p);
            }
        });
        self.last = cross(level, threads, &self.block, p, &image, p);
    }

    /// Cuts the space down to the `q` vectors of the largest eigenvalues, of which `r` are wanted.
    fn cut(&mut self, level: Level, threads: usize, q: usize, r: usize, control: &Control) -> Result<Found> {
        let (n, room, k, p) = (self.basis.n, self.basis.room, self.basis.count, self.p);
        let t = self.projection.chunks_exact(room).take(k).flat_map(|row| &row[..k]).copied().collect();
        let (mut values, rows) = whole::symmetric(level, threads, t, k, control)?;
        let q = q.min(k);
        values.truncate(q);
        let mut x = vec![0.0; k * q];
        transpose(&rows[..q * k], &mut x, q, k);
        let mut vectors = vec![0.0; n * q];
        self.basis.add(level, threads, &mut vectors, &x, q);
        let tail = |row: &[f64]| {
            let image = self.last.chunks_exact(p).map(|l| l.iter().zip(&row[k - p..]).map(|(l, x)| l * x).sum::<f64>());
            image.map(|x| x * x).sum::<f64>().sqrt()
        };
        let leaks = rows.chunks_exact(k).take(r).map(tail).collect();
        self.basis.count = 0;
        self.basis.push(&vectors, q);
        self.projection.fill(0.0);
        values.iter().enumerate().for_each(|(i, &x)| self.projection[i * room + i] = x);
        Ok(Found { values, vectors, leaks })
    }
}

/// How many vectors are looked for where `r` are wanted.
pub(super) fn wider(r: usize) -> usize {
    (r + r.clamp(16, 64)).next_multiple_of(STRIP)
}

/// Vectors of a block, and of the whole space.
fn sizes(r: usize) -> (usize, usize) {
    let p = r.next_multiple_of(STRIP);
    (p, wider(r) + LENGTH * p)
}

/// How many vectors a cycle holds, and whether the whole problem is solved instead: there is no room for a space that converges, or it is small.
pub(super) fn memory(n: usize, r: usize) -> (u64, bool) {
    let r = r.max(1);
    let (p, room) = sizes(r);
    // The space both ways, what is found of it, and copies that are made orthonormal and solved for.
    ((2 * (room + PANEL) + 2 * wider(r) + 6 * p) as u64, n < room + 2 * wider(r) || n < 640)
}

/// Vectors whose span has those of the `r` smallest eigenvalues, as orthonormal columns, and how many they are: more than `r`, because what
/// lies next to the span decides how exactly the matrix itself tells them apart.
///
/// # Errors
/// [`Error::Cancelled`].
pub(super) fn smallest(
    level: Level,
    threads: usize,
    a: &[f64],
    n: usize,
    r: usize,
    fresh: Philox,
    control: &Control,
) -> Result<(Vec<f64>, usize)> {
    let r = r.max(1);
    let b = wider(r);
    let everything = |a: &[f64]| {
        let (_, vectors) = symmetric_until(a, n, &|| control.cancelled()).ok_or(Error::Cancelled)?;
        let b = b.min(n);
        let mut columns = vec![0.0; n * b];
        transpose(&vectors[(n - b) * n..], &mut columns, b, n);
        Ok((columns, b))
    };
    if memory(n, r).1 {
        return everything(a);
    }
    let trace: f64 = (0..n).map(|i| a[i * n + i]).sum();
    // Far enough below zero that rounding makes no pivot negative, and no eigenvalue of the inverse so large that it blurs the others.
    let mut shift = -1e-12 * trace;
    let mut factor = None;
    for _ in 0..6 {
        factor = Factor::new(level, threads, a, n, shift, control)?;
        if factor.is_some() {
            break;
        }
        shift *= 16.0;
    }
    let Some(mut factor) = factor else { return everything(a) };
    let (p, room) = sizes(r);
    let mut space = Space::new(n, p, room);
    let mut block = vec![0.0; n * p];
    dispatch::normal(level, &mut block, fresh, 0, 1.0);
    space.drawn = block.len() as u64;
    space.start(level, threads, block, fresh);
    // The angle after the last cycle, and what a block takes from its logarithm.
    let (mut last, mut pace) = (1.0, -0.1);
    for cycle in 0..CYCLES {
        // The first cycle is short: it says where to put the shift. So is the last one, which has little left to do.
        let wanted = if cycle == 0 { FIRST } else { ((CLOSE / last).ln() / pace).ceil().max(2.0) as usize };
        let length = wanted.min((room - space.basis.count) / p);
        for _ in 0..length {
            if control.cancelled() {
                return Err(Error::Cancelled);
            }
            space.grow(level, threads, &factor, fresh);
        }
        let found = space.cut(level, threads, b, r, control)?;
        let at = |i: usize| shift + 1.0 / found.values[i];
        // The angle between a wanted vector and the span. Where many eigenvalues are one (zero, for a matrix of low rank) any vectors of theirs will do.
        let gap = (found.values[r - 1] - found.values[b - 1]).max(1e-3 * found.values[r - 1]);
        let worst = found.leaks.iter().fold(0.0f64, |m, &x| m.max(x)) / gap;
        // Rounding may leave it at a little more.
        if worst <= CLOSE || (worst <= 1e2 * CLOSE && worst > 0.3 * last) {
            return Ok((found.vectors, b));
        }
        pace = ((worst / last).ln() / length as f64).min(-0.1);
        last = worst;
        // Where eigenvalues crowd together away from zero, a shift close below them pulls their inverses apart.
        let spread = at(r - 1) - at(0);
        if cycle == 0 && at(0) - shift > 0.5 * spread {
            let mut below = 0.5;
            for _ in 0..5 {
                let next = at(0) - below * spread;
                if next <= shift {
                    break;
                }
                if let Some(better) = Factor::new(level, threads, a, n, next, control)? {
                    factor = better;
                    shift = next;
                    (last, pace) = (1.0, -0.1);
                    let best = found.vectors.chunks_exact(b).flat_map(|row| &row[..p]).copied().collect();
                    space.start(level, threads, best, fresh);
                    break;
                }
                below *= 2.0;
            }
        }
    }
    everything(a)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::dense::{add_lower, pack, packed};
    use crate::linalg::eigen;

    /// `a^T a` for a random `a` of `rows x n`, its columns times `scale`.
    fn gram(rows: usize, n: usize, scale: impl Fn(usize) -> f64) -> Vec<f64> {
        let mut a = vec![0.0; rows * n];
        dispatch::normal(Level::portable(), &mut a, Philox::new(5, "i", 1), 0, 1.0);
        for row in a.chunks_exact_mut(n) {
            row.iter_mut().enumerate().for_each(|(j, x)| *x *= scale(j));
        }
        let (mut both, mut values) = (packed(n, rows), vec![0.0; n * n]);
        pack(1, &mut both, &a, n);
        add_lower(Level::portable(), 1, &mut values, n, &both, rows);
        for i in 0..n {
            for j in i + 1..n {
                values[i * n + j] = values[j * n + i];
            }
        }
        values
    }

    fn found(level: Level, threads: usize, a: &[f64], n: usize, r: usize) -> (Vec<f64>, usize) {
        smallest(level, threads, a, n, r, Philox::new(5, "i", 2), &Control::default()).expect("not cancelled")
    }

    #[test]
    fn a_packed_product_is_the_product_at_every_level_and_thread_count() {
        for (rows, n) in [(1, 1), (7, 13), (30, 97), (50, 211)] {
            let mut a = vec![0.0; rows * n];
            dispatch::normal(Level::portable(), &mut a, Philox::new(5, "i", 3), 0, 1.0);
            let mut both = packed(n, rows);
            pack(2, &mut both, &a, n);
            let of = |level, threads| {
                let mut values = vec![0.0; n * n];
                add_lower(level, threads, &mut values, n, &both, rows);
                values
            };
            let first = of(Level::portable(), 1);
            for i in 0..n {
                for j in 0..=i {
                    let wanted: f64 = (0..rows).map(|k| a[k * n + i] * a[k * n + j]).sum();
                    assert!((first[i * n + j] - wanted).abs() < 1e-12 * rows as f64, "{rows} x {n}");
                }
            }
            for level in Level::available() {
                assert_eq!(of(level, 3), first);
            }
        }
    }

    #[test]
    fn a_factor_solves() {
        let n = 2 * NB + 31;
        let a = gram(2 * n, n, |_| 1.0);
        let (level, control) = (Level::portable(), Control::default());
        let factor = Factor::new(level, 2, &a, n, 0.5, &control).expect("not cancelled").expect("positive");
        let b = 11;
        let mut x = vec![0.0; n * b];
        dispatch::normal(level, &mut x, Philox::new(5, "i", 4), 0, 1.0);
        let y = factor.solve(level, 1, &x, b);
        for i in 0..n {
            for c in 0..b {
                let image: f64 = (0..n).map(|k| a[i * n + k] * y[k * b + c]).sum::<f64>() - 0.5 * y[i * b + c];
                assert!((image - x[i * b + c]).abs() < 1e-9);
            }
        }
        for level in Level::available() {
            let factor = Factor::new(level, 3, &a, n, 0.5, &control).expect("not cancelled").expect("positive");
            assert_eq!(factor.solve(level, 3, &x, b), y);
        }
        assert!(Factor::new(level, 1, &a, n, 1e6, &control).expect("not cancelled").is_none());
        control.cancel();
        assert!(matches!(Factor::new(level, 1, &a, n, 0.5, &control), Err(Error::Cancelled)));
    }

    #[test]
    fn the_smallest_are_found_also_where_many_are_one() {
        let (n, r) = (650, 20);
        assert!(!memory(n, r).1);
        // Away from zero; many zeros, of which all wanted ones are copies; thirty of them, few more than wanted; far apart.
        let cases: [(usize, &dyn Fn(usize) -> f64); 4] = [
            (2 * n, &|_| 1.0),
            (40, &|_| 1.0),
            (n, &|j| if j < 30 { 0.0 } else { 1.0 }),
            (n, &|j| 0.98f64.powi(j as i32)),
        ];
        for (rows, scale) in cases {
            let a = gram(rows, n, scale);
            let values = eigen::symmetric(&a, n).0;
            let (vectors, b) = found(Level::portable(), 1, &a, n, r);
            // Ritz values of the matrix on the span.
            let images: Vec<f64> = a
                .chunks_exact(n)
                .flat_map(|row| {
                    let vectors = &vectors;
                    (0..b).map(move |c| row.iter().zip(vectors.iter().skip(c).step_by(b)).map(|(a, v)| a * v).sum())
                })
                .collect();
            let level = Level::portable();
            let own = cross(level, 1, &vectors, b, &vectors, b);
            for (e, x) in own.iter().enumerate() {
                assert!((x - if e / b == e % b { 1.0 } else { 0.0 }).abs() < 1e-11);
            }
            let ritz = eigen::symmetric(&cross(level, 1, &vectors, b, &images, b), b).0;
            for (value, wanted) in ritz.iter().rev().zip(values.iter().rev()).take(r) {
                assert!((value - wanted).abs() < 1e-12 * values[0], "{rows} rows: {value}, not {wanted}");
            }
        }
    }

    #[test]
    fn the_smallest_are_the_same_at_every_level_and_thread_count() {
        let (n, r) = (641, 3);
        let a = gram(n + 50, n, |_| 1.0);
        let first = found(Level::portable(), 1, &a, n, r);
        for level in Level::available() {
            assert!(found(level, 3, &a, n, r) == first);
        }
    }
}
