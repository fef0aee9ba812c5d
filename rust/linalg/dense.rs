//! Matrices in memory: tall ones (many rows, few columns) and small square ones, row by row.
//!
//! Sums over rows go in fixed chunks that are joined in order; rows of results are shared out among threads. Neither depends on how many threads there are.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::bf16::Work;
use crate::philox::Philox;
use crate::simd::{Level, dispatch};

/// Rows that are summed before sums are joined.
const CHUNK: usize = 512;

/// Calls `work` with every number below `count`, on up to `threads` threads.
pub(super) fn share(threads: usize, count: usize, work: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(0);
    let worker = || {
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= count {
                return;
            }
            work(i);
        }
    };
    std::thread::scope(|s| {
        for _ in 1..threads.min(count) {
            s.spawn(worker);
        }
        worker();
    });
}

/// `into = from^T`, of `rows x columns`.
pub fn transpose<A: Work, B: Work>(from: &[A], into: &mut [B], rows: usize, columns: usize) {
    const SIDE: usize = 16;
    for i in (0..rows).step_by(SIDE) {
        for j in (0..columns).step_by(SIDE) {
            for r in i..(i + SIDE).min(rows) {
                for c in j..(j + SIDE).min(columns) {
                    into[c * rows + r] = B::from_f64(from[r * columns + c].to_f64());
                }
            }
        }
    }
}

/// [`transpose`] by several threads.
pub(super) fn transpose_shared(threads: usize, from: &[f64], into: &mut [f64], rows: usize, columns: usize) {
    const SIDE: usize = 64;
    let slots: Vec<Mutex<&mut [f64]>> = into.chunks_mut(SIDE * rows).map(Mutex::new).collect();
    share(threads, slots.len(), |i| {
        let mut slot = slots[i].lock().unwrap_or_else(PoisonError::into_inner);
        for r in (0..rows).step_by(SIDE) {
            let high = SIDE.min(rows - r);
            for (c, into) in slot.chunks_exact_mut(rows).enumerate() {
                for (k, o) in into[r..r + high].iter_mut().enumerate() {
                    *o = from[(r + k) * columns + i * SIDE + c];
                }
            }
        }
    });
}

/// Columns of a strip of [`pack`].
const STRIP: usize = 8;
/// Rows of [`add_lower`] that a thread takes.
const STRIPE: usize = 8 * dispatch::PANEL;

/// Where [`pack`] puts `n` columns of a depth: strips, and panels.
pub(super) fn packed(n: usize, depth: usize) -> [Vec<f64>; 2] {
    [STRIP, dispatch::PANEL].map(|width| vec![0.0; n.next_multiple_of(width) * depth])
}

/// `depth` rows of `n` for [`add_lower`]: columns in strips, as its right factor, and in panels, as its left one.
pub(super) fn pack(threads: usize, [strips, panels]: &mut [Vec<f64>; 2], from: &[f64], n: usize) {
    for (into, width) in [(strips, STRIP), (panels, dispatch::PANEL)] {
        let size = n.next_multiple_of(width) * (from.len() / n);
        pack_columns(threads, &mut into[..size], from, n, width);
    }
}

/// Columns, `width` of them together, row behind row.
fn pack_columns(threads: usize, into: &mut [f64], from: &[f64], n: usize, width: usize) {
    let depth = from.len() / n;
    // Several at once read along whole lines of memory.
    const TOGETHER: usize = 8;
    let slots: Vec<Mutex<&mut [f64]>> = into.chunks_mut(TOGETHER * width * depth).map(Mutex::new).collect();
    share(threads, slots.len(), |i| {
        let mut slot = slots[i].lock().unwrap_or_else(PoisonError::into_inner);
        for (k, row) in from.chunks_exact(n).enumerate() {
            let row = &row[i * TOGETHER * width..];
            for (into, from) in slot.chunks_exact_mut(width * depth).zip(row.chunks(width)) {
                into[k * width..][..from.len()].copy_from_slice(from);
            }
        }
    });
}

/// `into += a^T a` on and below the diagonal, for a packed `a` of `depth x n`.
pub(super) fn add_lower(
    level: Level,
    threads: usize,
    into: &mut [f64],
    n: usize,
    [strips, panels]: &[Vec<f64>; 2],
    depth: usize,
) {
    let slots: Vec<Mutex<&mut [f64]>> = into.chunks_mut(STRIPE * n).map(Mutex::new).collect();
    // The longest stripes first: they are the last ones.
    share(threads, slots.len(), |i| {
        let i = slots.len() - 1 - i;
        let mut slot = slots[i].lock().unwrap_or_else(PoisonError::into_inner);
        let rows = STRIPE.min(n - i * STRIPE);
        let a = &panels[i * STRIPE * depth..];
        for strip in 0..(i * STRIPE + rows).div_ceil(STRIP) {
            let strides = [n, dispatch::PANEL * depth, STRIP];
            let size = [rows, depth, STRIP.min(n - strip * STRIP)];
            let (into, b) = (&mut slot[strip * STRIP..], &strips[strip * STRIP * depth..]);
            dispatch::multiply_panels(level, into, a, b, strides, size, level.tall());
        }
    });
}

/// `a^T b` for tall `a` (`rows x p`) and `b` (`rows x q`).
pub fn cross<A: Work, B: Work>(level: Level, threads: usize, a: &[A], p: usize, b: &[B], q: usize) -> Vec<f64> {
    let rows = a.len() / p.max(1);
    let chunks = rows.div_ceil(CHUNK).max(1);
    let mut parts = vec![0.0; chunks * p * q];
    let slots: Vec<Mutex<&mut [f64]>> = parts.chunks_mut((p * q).max(1)).map(Mutex::new).collect();
    // Few rows are not worth a thread.
    let threads = if rows * p * q < 1 << 20 { 1 } else { threads };
    share(threads, slots.len(), |i| {
        let (from, to) = (i * CHUNK, ((i + 1) * CHUNK).min(rows));
        let depth = to - from;
        let lent = &mut [vec![], vec![]];
        let [left, right] = lent;
        let (a, b) = (A::doubles(&a[from * p..to * p], left), B::doubles(&b[from * q..to * q], right));
        let mut slot = slots[i].lock().unwrap_or_else(PoisonError::into_inner);
        dispatch::cross(level, &mut slot, a, b, [q, p, q], [p, depth, q], level.tall());
    });
    let mut sum = vec![0.0; p * q];
    for part in parts.chunks((p * q).max(1)) {
        sum.iter_mut().zip(part).for_each(|(s, x)| *s += x);
    }
    sum
}

/// `into += a c` for tall `a` (`rows x p`) and small `c` (`p x q`).
pub fn add_product<A: Work>(level: Level, threads: usize, into: &mut [f64], a: &[A], p: usize, c: &[f64], q: usize) {
    if q == 0 || p == 0 {
        return;
    }
    let rows = a.len() / p;
    let slots: Vec<Mutex<&mut [f64]>> = into.chunks_mut(CHUNK * q).map(Mutex::new).collect();
    let threads = if rows * p * q < 1 << 20 { 1 } else { threads };
    share(threads, slots.len(), |i| {
        let (from, to) = (i * CHUNK, ((i + 1) * CHUNK).min(rows));
        let mut left = vec![];
        let a = A::doubles(&a[from * p..to * p], &mut left);
        let mut slot = slots[i].lock().unwrap_or_else(PoisonError::into_inner);
        dispatch::multiply(level, &mut slot, a, c, [q, p, q], [to - from, p, q], level.tall());
    });
}

/// `a^T a` for the tall matrix `a` whose columns are blocks of `b` each, side by side.
pub(super) fn gram<A: Work>(level: Level, threads: usize, blocks: &[Vec<A>], b: usize) -> Vec<f64> {
    let (rows, k) = (blocks.first().map_or(0, |a| a.len() / b), blocks.len() * b);
    let mut parts = vec![0.0; rows.div_ceil(CHUNK) * k * k];
    let slots: Vec<Mutex<&mut [f64]>> = parts.chunks_mut((k * k).max(1)).map(Mutex::new).collect();
    let threads = if rows * k * k < 1 << 20 { 1 } else { threads };
    share(threads, slots.len(), |i| {
        let (from, to) = (i * CHUNK, ((i + 1) * CHUNK).min(rows));
        let mut lent = vec![vec![]; blocks.len()];
        let blocks: Vec<&[f64]> =
            blocks.iter().zip(&mut lent).map(|(a, lent)| A::doubles(&a[from * b..to * b], lent)).collect();
        let mut slot = slots[i].lock().unwrap_or_else(PoisonError::into_inner);
        for (y, left) in blocks.iter().enumerate() {
            for (x, right) in blocks.iter().enumerate().take(y + 1) {
                let into = &mut slot[y * b * k + x * b..];
                dispatch::cross(level, into, left, right, [k, b, b], [b, to - from, b], level.tall());
            }
        }
    });
    drop(slots);
    let mut sum = vec![0.0; k * k];
    for part in parts.chunks((k * k).max(1)) {
        sum.iter_mut().zip(part).for_each(|(s, x)| *s += x);
    }
    for y in 0..k {
        for x in 0..y {
            sum[x * k + y] = sum[y * k + x];
        }
    }
    sum
}

/// `a c`, rounded, for the tall matrix `a` whose columns are blocks of `b` each, side by side, and a `c` of `q` columns.
pub(super) fn combine<A: Work, B: Work>(
    level: Level,
    threads: usize,
    blocks: &[Vec<A>],
    b: usize,
    c: &[f64],
    q: usize,
) -> Vec<B> {
    // What is made of so few rows stays in the first caches.
    const ROWS: usize = CHUNK / 4;
    let (rows, k) = (blocks.first().map_or(0, |a| a.len() / b), blocks.len() * b);
    let mut into = vec![B::ZERO; rows * q];
    if q == 0 {
        return into;
    }
    let slots: Vec<Mutex<&mut [B]>> = into.chunks_mut(ROWS * q).map(Mutex::new).collect();
    let threads = if rows * k * q < 1 << 20 { 1 } else { threads };
    share(threads, slots.len(), |i| {
        let (from, to) = (i * ROWS, ((i + 1) * ROWS).min(rows));
        let (mut wide, mut sums) = (vec![0.0; (to - from) * k], vec![0.0; (to - from) * q]);
        for (x, block) in blocks.iter().enumerate() {
            for (into, row) in wide.chunks_exact_mut(k).zip(block[from * b..to * b].chunks_exact(b)) {
                into[x * b..][..b].iter_mut().zip(row).for_each(|(o, x)| *o = x.to_f64());
            }
        }
        dispatch::multiply(level, &mut sums, &wide, c, [q, k, q], [to - from, k, q], level.tall());
        let mut slot = slots[i].lock().unwrap_or_else(PoisonError::into_inner);
        slot.iter_mut().zip(&sums).for_each(|(o, &x)| *o = B::from_f64(x));
    });
    drop(slots);
    into
}

/// The product of small matrices, `rows x depth` and `depth x columns`.
pub fn product(level: Level, a: &[f64], b: &[f64], rows: usize, depth: usize, columns: usize) -> Vec<f64> {
    let mut out = vec![0.0; rows * columns];
    dispatch::multiply(level, &mut out, a, b, [columns, depth, columns], [rows, depth, columns], level.tall());
    out
}

/// The upper triangular `r` with `r^T r = g`, or nothing if some pivot is below `least` of its diagonal element.
pub fn cholesky(g: &[f64], n: usize, least: f64) -> Option<Vec<f64>> {
    let mut r = g.to_vec();
    for k in 0..n {
        let (done, rest) = r.split_at_mut((k + 1) * n);
        let row = &mut done[k * n..];
        row[..k].fill(0.0);
        let pivot = row[k];
        if pivot.is_nan() || pivot <= least * g[k * n + k].abs() || pivot < f64::MIN_POSITIVE {
            return None;
        }
        row[k] = pivot.sqrt();
        let root = row[k];
        row[k + 1..].iter_mut().for_each(|x| *x /= root);
        // What the row takes from those below it: along memory, and for every element in the order of rows.
        for (i, below) in rest.chunks_exact_mut(n).enumerate() {
            let i = k + 1 + i;
            let by = row[i];
            below[i..].iter_mut().zip(&row[i..]).for_each(|(x, &r)| *x -= by * r);
        }
    }
    Some(r)
}

/// The inverse of an upper triangular matrix.
pub fn invert_triangle(r: &[f64], n: usize) -> Vec<f64> {
    let mut inverse = vec![0.0; n * n];
    for i in (0..n).rev() {
        let (above, below) = inverse.split_at_mut((i + 1) * n);
        let row = &mut above[i * n..];
        for (k, done) in (i + 1..n).zip(below.chunks_exact(n)) {
            let by = r[i * n + k];
            row[k..].iter_mut().zip(&done[k..]).for_each(|(x, &d)| *x += by * d);
        }
        let pivot = r[i * n + i];
        row.iter_mut().for_each(|x| *x = -*x / pivot);
        row[i] = 1.0 / pivot;
    }
    inverse
}

/// Makes the columns of `w` (`rows x b`) orthonormal, and orthogonal to those of earlier blocks, which are orthonormal.
///
/// As [`orthonormalise_by`].
pub fn orthonormalise(level: Level, threads: usize, w: &mut Vec<f64>, b: usize, earlier: &[Vec<f64>], fresh: Philox) {
    orthonormalise_by(level, threads, w, b, (fresh, &mut 0), |w| {
        for v in earlier {
            let k = v.len() * b / w.len();
            let mut c = cross(level, threads, v, k, w, b);
            c.iter_mut().for_each(|c| *c = -*c);
            add_product(level, threads, w, v, k, &c, b);
        }
    });
}

/// Makes the columns of `w` (`rows x b`) orthonormal, and orthogonal to what `project` takes from them.
///
/// Block Gram-Schmidt, twice, and Cholesky QR, twice: with f64 sums that is stable for condition numbers up to 1e7 (Yamamoto et al. 2015,
/// "Roundoff error analysis of the CholeskyQR2 algorithm"). Columns that depend on others beyond that are replaced by random ones, so that there
/// always are `b` directions; there must be room for them.
pub(super) fn orthonormalise_by(
    level: Level,
    threads: usize,
    w: &mut Vec<f64>,
    b: usize,
    (fresh, drawn): (Philox, &mut u64),
    mut project: impl FnMut(&mut [f64]),
) {
    let rows = w.len() / b.max(1);
    let scales = cross(level, threads, w, b, w, b);
    let scales: Vec<f64> = (0..b).map(|j| scales[j * b + j].sqrt()).collect();
    // To unit columns, because squares of small numbers are lost.
    for row in w.chunks_exact_mut(b) {
        row.iter_mut().zip(&scales).for_each(|(x, &s)| *x = if s > 0.0 { *x / s } else { 0.0 });
    }
    let mut q = vec![0.0; w.len()];
    for _ in 0..8 {
        let mut healthy = true;
        for _ in 0..2 {
            project(w);
            let g = cross(level, threads, w, b, w, b);
            if let Some(r) = cholesky(&g, b, 1e-14) {
                q.fill(0.0);
                add_product(level, threads, &mut q, w, b, &invert_triangle(&r, b), b);
                std::mem::swap(w, &mut q);
                continue;
            }
            healthy = false;
            let (values, vectors) = super::eigen::symmetric(&g, b);
            let kept = values.iter().take_while(|&&v| v > 1e-13 * values[0] && v > 1e-24).count();
            let mut c = vec![0.0; b * b];
            for (i, v) in vectors.chunks_exact(b).enumerate().take(kept) {
                for (k, x) in v.iter().enumerate() {
                    c[k * b + i] = x / values[i].sqrt();
                }
            }
            q.fill(0.0);
            add_product(level, threads, &mut q, w, b, &c, b);
            let scale = 1.0 / (rows as f64).sqrt();
            let mut noise = vec![0.0; (b - kept).max(1)];
            for row in q.chunks_exact_mut(b) {
                dispatch::normal(level, &mut noise[..b - kept], fresh, *drawn, scale);
                *drawn += (b - kept) as u64;
                row[kept..].copy_from_slice(&noise[..b - kept]);
            }
            std::mem::swap(w, &mut q);
        }
        if healthy {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(count: usize, seed: u64) -> Vec<f64> {
        let mut values = vec![0.0; count];
        dispatch::normal(Level::portable(), &mut values, Philox::new(seed, "t", 1), 0, 1.0);
        values
    }

    /// Blocks of columns side by side.
    fn joined(blocks: &[Vec<f64>], b: usize) -> Vec<f64> {
        let rows = blocks[0].len() / b;
        (0..rows).flat_map(|i| blocks.iter().flat_map(move |a| a[i * b..(i + 1) * b].iter().copied())).collect()
    }

    #[test]
    fn cross_products_are_those_of_the_transpose_at_every_level_and_thread_count() {
        for [rows, p, q] in [[1, 1, 1], [700, 16, 32], [1030, 23, 21], [5, 70, 9], [1500, 33, 40]] {
            let (a, b) = (random(rows * p, 1), random(rows * q, 2));
            let first = cross(Level::portable(), 1, &a, p, &b, q);
            for (e, x) in first.iter().enumerate() {
                let (i, j) = (e / q, e % q);
                let wanted: f64 = (0..rows).map(|k| a[k * p + i] * b[k * q + j]).sum();
                assert!((x - wanted).abs() < 1e-11 * rows as f64);
            }
            for level in Level::available() {
                assert_eq!(cross(level, 3, &a, p, &b, q), first);
            }
        }
    }

    #[test]
    fn cross_products_in_f32_are_the_same_at_every_level() {
        let [rows, p, q] = [50, 21, 37];
        let single = |seed| random(rows * q, seed).iter().map(|&x| x as f32).collect::<Vec<_>>();
        let (a, b) = (single(1), single(2));
        let mut turned = vec![0.0f32; rows * q];
        transpose(&a, &mut turned, rows, q);
        let mut wanted = vec![1.0f32; p * q];
        dispatch::multiply(Level::portable(), &mut wanted, &turned, &b, [q, rows, q], [p, rows, q], 4);
        for level in Level::available() {
            let mut found = vec![1.0f32; p * q];
            dispatch::cross(level, &mut found, &a, &b, [q, q, q], [p, rows, q], level.tall());
            assert_eq!(found, wanted);
        }
    }

    #[test]
    fn blocks_are_one_matrix() {
        let (rows, b, q) = (1100, 16, 21);
        let blocks: Vec<Vec<f64>> = (0..3).map(|i| random(rows * b, i)).collect();
        let (a, k, c) = (joined(&blocks, b), 3 * b, random(3 * b * q, 9));
        let (squares, mut product) = (cross(Level::portable(), 1, &a, k, &a, k), vec![0.0; rows * q]);
        add_product(Level::portable(), 1, &mut product, &a, k, &c, q);
        let single: Vec<f32> = product.iter().map(|&x| x as f32).collect();
        for (level, threads) in Level::available().into_iter().flat_map(|l| [(l, 1), (l, 3)]) {
            assert_eq!(gram(level, threads, &blocks, b), squares);
            assert_eq!(combine::<_, f64>(level, threads, &blocks, b, &c, q), product);
            assert_eq!(combine::<_, f32>(level, threads, &blocks, b, &c, q), single);
        }
        assert!(combine::<_, f32>(Level::portable(), 1, &blocks, b, &[], 0).is_empty());
    }

    #[test]
    fn dependent_columns_become_orthonormal_ones() {
        let level = Level::portable();
        let (rows, b) = (90, 16);
        for copies in [1, 5, 16] {
            let mut w: Vec<f64> = random(rows * b, 3);
            for row in w.chunks_exact_mut(b) {
                let first = row[0];
                row[..copies].fill(first);
            }
            let mut earlier: Vec<f64> = random(rows * b, 4);
            orthonormalise(level, 1, &mut earlier, b, &[], Philox::new(0, "t", 5));
            let earlier = [earlier];
            orthonormalise(level, 1, &mut w, b, &earlier, Philox::new(0, "t", 6));
            let (own, other) = (cross(level, 1, &w, b, &w, b), cross(level, 1, &earlier[0], b, &w, b));
            for i in 0..b {
                for j in 0..b {
                    let wanted = if i == j { 1.0 } else { 0.0 };
                    assert!((own[i * b + j] - wanted).abs() < 1e-12 && other[i * b + j].abs() < 1e-12);
                }
            }
        }
    }
}
