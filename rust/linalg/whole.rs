//! The eigenproblem of a large symmetric matrix, all of it.
//!
//! The algorithm is that of [`super::eigen`] (Householder reduction and the implicit QL iteration), in an order that spares memory: the update of
//! the matrix by one reflector and its product with the next go along each row together; reflectors are applied to few rows of the
//! vectors at a time, and rotations, many sweeps of them at once, to few columns. Neither order changes a sum: results are the same for any thread count.

use std::sync::{Mutex, PoisonError};

use super::dense::share;
use super::eigen;
use crate::simd::{Level, dispatch};
use crate::stream::Control;
use crate::{Error, Result};

/// Columns of the vectors that are rotated together.
const STRIP: usize = dispatch::TURNED;
/// Rows of the vectors that are reflected together.
const ROWS: usize = 8;
/// Rotations that are kept before they are applied, in sweeps through all rows.
const SWEEPS: usize = 48;

/// A reflector's vector `u`, and `p`, with which the matrix becomes `a - u p^T - p u^T`.
type Update = (Vec<f64>, Vec<f64>);

/// A diagonal, what is beside it, and the reflectors that lead there.
type Tridiagonal = (Vec<f64>, Vec<f64>, Vec<Vec<f64>>);

/// Eigenvalues, descending, and eigenvectors, one a row, of a symmetric matrix of `n` rows, which is used up. The largest component of each
/// vector is positive.
///
/// # Errors
/// [`Error::Cancelled`].
pub(crate) fn symmetric(
    level: Level,
    threads: usize,
    mut a: Vec<f64>,
    n: usize,
    control: &Control,
) -> Result<(Vec<f64>, Vec<f64>)> {
    if n == 0 {
        return Ok((vec![], vec![]));
    }
    let (mut d, mut e, reflectors) = reduce(level, &mut a, n, control)?;
    let mut strips = transformation(level, threads, a, n, &reflectors, control);
    drop(reflectors);
    iterate(level, threads, &mut d, &mut e, &strips, control)?;
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&i, &j| d[j].total_cmp(&d[i]).then(i.cmp(&j)));
    let mut vectors = vec![0.0; n * n];
    for (&i, row) in order.iter().zip(vectors.chunks_exact_mut(n)) {
        for (into, strip) in row.chunks_mut(STRIP).zip(&mut strips) {
            let strip = strip.get_mut().unwrap_or_else(PoisonError::into_inner);
            into.copy_from_slice(&strip[i * STRIP..][..into.len()]);
        }
        let largest = row.iter().fold(0.0f64, |m, &x| if x.abs() > m.abs() { x } else { m });
        if largest < 0.0 {
            row.iter_mut().for_each(|x| *x = -*x);
        }
    }
    Ok((order.iter().map(|&i| d[i]).collect(), vectors))
}

fn check(control: &Control) -> Result<()> {
    if control.cancelled() { Err(Error::Cancelled) } else { Ok(()) }
}

/// The tridiagonal matrix (its diagonal, and what is beside it, the first of which is zero), and the reflectors that lead there.
fn reduce(level: Level, a: &mut [f64], n: usize, control: &Control) -> Result<Tridiagonal> {
    let (mut d, mut e) = (vec![0.0; n], vec![0.0; n]);
    let mut reflectors: Vec<Vec<f64>> = vec![vec![]; n];
    let mut pending: Option<Update> = None;
    let updated = |line: &mut [f64], j: usize, pending: &Option<Update>| {
        if let Some((u, p)) = pending {
            dispatch::scaled_work(level, line, &p[..=j], -u[j], false);
            dispatch::scaled_work(level, line, &u[..=j], -p[j], false);
        }
    };
    for i in (0..n).rev() {
        check(control)?;
        let (above, row) = a.split_at_mut(i * n);
        updated(&mut row[..=i], i, &pending);
        d[i] = row[i];
        if i == 0 {
            break;
        }
        let row = &row[..i];
        let scale: f64 = row.iter().map(|x| x.abs()).sum();
        let tail: f64 = row[..i - 1].iter().map(|x| x.abs()).sum();
        if tail == 0.0 {
            e[i] = row[i - 1];
            (0..i).for_each(|j| updated(&mut above[j * n..=j * n + j], j, &pending));
            pending = None;
            continue;
        }
        let mut u: Vec<f64> = row.iter().map(|x| x / scale).collect();
        let mut h = dispatch::dot(level, &u, &u);
        let f = u[i - 1];
        let g = if f >= 0.0 { -h.sqrt() } else { h.sqrt() };
        e[i] = scale * g;
        h -= f * g;
        u[i - 1] = f - g;
        let mut p = vec![0.0; i];
        for j in 0..i {
            let line = &mut above[j * n..=j * n + j];
            updated(line, j, &pending);
            // The lower triangle alone stands for both.
            let sum = dispatch::dot(level, &line[..j], &u[..j]);
            dispatch::scaled_work(level, &mut p[..j], &line[..j], u[j], false);
            p[j] += sum + line[j] * u[j];
        }
        p.iter_mut().for_each(|p| *p /= h);
        let k = dispatch::dot(level, &p, &u) / (h + h);
        dispatch::scaled_work(level, &mut p, &u, -k, false);
        let root = h.sqrt();
        reflectors[i] = u.iter().map(|u| u / root).collect();
        pending = Some((u, p));
    }
    Ok((d, e, reflectors))
}

/// The product of the reflectors, one column of it a row, in strips of columns. `room` is used up.
fn transformation(
    level: Level,
    threads: usize,
    mut room: Vec<f64>,
    n: usize,
    reflectors: &[Vec<f64>],
    control: &Control,
) -> Vec<Mutex<Vec<f64>>> {
    room.fill(0.0);
    let blocks: Vec<Mutex<&mut [f64]>> = room.chunks_mut(ROWS * n).map(Mutex::new).collect();
    share(threads, blocks.len(), |b| {
        let mut block = blocks[b].lock().unwrap_or_else(PoisonError::into_inner);
        for (r, row) in block.chunks_exact_mut(n).enumerate() {
            row[b * ROWS + r] = 1.0;
        }
        // Before its own place a row is zero, and stays so under the shorter reflectors.
        for reflector in &reflectors[b * ROWS..] {
            if control.cancelled() {
                return;
            }
            for row in block.chunks_exact_mut(n) {
                let row = &mut row[..reflector.len()];
                let k = dispatch::dot(level, row, reflector);
                if k != 0.0 {
                    dispatch::scaled_work(level, row, reflector, -k, false);
                }
            }
        }
    });
    drop(blocks);
    (0..n.div_ceil(STRIP))
        .map(|s| {
            let mut strip = vec![0.0; n * STRIP];
            let width = STRIP.min(n - s * STRIP);
            for (into, row) in strip.chunks_exact_mut(STRIP).zip(room.chunks_exact(n)) {
                into[..width].copy_from_slice(&row[s * STRIP..][..width]);
            }
            Mutex::new(strip)
        })
        .collect()
}

/// The rotations of one sweep, as [`eigen::iterate`] tells them.
struct Turns {
    from: usize,
    turns: Vec<[f64; 2]>,
}

/// The QL iteration; rows of the strips are turned along, many sweeps at once.
fn iterate(
    level: Level,
    threads: usize,
    d: &mut [f64],
    e: &mut [f64],
    strips: &[Mutex<Vec<f64>>],
    control: &Control,
) -> Result<()> {
    let n = d.len();
    let (mut kept, mut count): (Vec<Turns>, usize) = (Vec::new(), 0);
    let apply = |kept: &mut Vec<Turns>| {
        share(threads, strips.len(), |s| {
            let mut strip = strips[s].lock().unwrap_or_else(PoisonError::into_inner);
            for Turns { from, turns } in &*kept {
                if control.cancelled() {
                    return;
                }
                dispatch::turn(level, &mut strip, *from, turns);
            }
        });
        kept.clear();
    };
    let ended = eigen::iterate(d, e, &|| control.cancelled(), |from, turns| {
        kept.push(Turns { from, turns: turns.to_vec() });
        count += turns.len();
        if count >= SWEEPS * n {
            apply(&mut kept);
            count = 0;
        }
    });
    ended.ok_or(Error::Cancelled)?;
    apply(&mut kept);
    check(control)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::philox::Philox;

    /// Random, of low rank, diagonal, or zero.
    fn matrix(n: usize, rank: usize) -> Vec<f64> {
        let mut f = vec![0.0; n * rank];
        dispatch::normal(Level::portable(), &mut f, Philox::new(9, "w", 1), 0, 1.0);
        let at = |i: usize, j: usize| (0..rank).map(|k| f[i * rank + k] * f[j * rank + k]).sum();
        (0..n * n).map(|e| at(e / n, e % n)).collect()
    }

    fn dot(a: &[f64], b: &[f64]) -> f64 {
        a.iter().zip(b).map(|(a, b)| a * b).sum()
    }

    #[test]
    fn eigenpairs_are_those_of_the_matrix_and_the_same_everywhere() {
        for (n, rank) in [(1, 1), (2, 2), (3, 1), (40, 50), (97, 97), (70, 4), (33, 0)] {
            let a = matrix(n, rank);
            let (values, vectors) =
                symmetric(Level::portable(), 1, a.clone(), n, &Control::default()).expect("not cancelled");
            let (others, _) = eigen::symmetric(&a, n);
            let largest = others[0].max(1e-300);
            assert!(values.iter().zip(&others).all(|(v, o)| (v - o).abs() <= 1e-12 * largest), "{n}, {rank}");
            for (i, (value, v)) in values.iter().zip(vectors.chunks_exact(n)).enumerate() {
                for (row, x) in a.chunks_exact(n).zip(v) {
                    assert!((dot(row, v) - value * x).abs() <= 1e-11 * largest);
                }
                for (j, w) in vectors.chunks_exact(n).enumerate() {
                    assert!((dot(v, w) - if i == j { 1.0 } else { 0.0 }).abs() < 1e-11);
                }
            }
            for level in Level::available() {
                let again = symmetric(level, 3, a.clone(), n, &Control::default()).expect("not cancelled");
                assert_eq!(again, (values.clone(), vectors.clone()));
            }
        }
    }

    #[test]
    fn it_ends_when_it_is_cancelled() {
        let control = Control::default();
        control.cancel();
        let found = symmetric(Level::portable(), 2, matrix(40, 40), 40, &control);
        assert!(matches!(found, Err(Error::Cancelled)));
    }
}
