//! Thin factors: the SVD of a matrix that is known as a product `u v^T` of a tall matrix and a wide one.
//!
//! What the Krylov sweeps of [`super::rsvd`] and the small side's Gram matrix end in, and what a sum of low-rank matrices is.

use super::dense::{add_product, cholesky, cross, invert_triangle, orthonormalise, product, transpose};
use super::eigen::jacobi;
use super::rsvd::{FRESH, choose, cut};
use super::{Exact, Rank, Triplets};
use crate::philox::Philox;
use crate::simd::Level;
use crate::{Error, Result};

/// The thin SVD of `u v^T`, whose factors have `k` columns, rounded to f32.
pub(super) fn finish(level: Level, threads: usize, u: Vec<f64>, v: Vec<f64>, k: usize, squares: f64) -> Triplets {
    exactly(level, threads, u, v, k, squares).round()
}

/// The thin SVD of `u v^T`, whose factors have `k` columns.
pub(super) fn exactly(level: Level, threads: usize, u: Vec<f64>, v: Vec<f64>, k: usize, squares: f64) -> Exact {
    if k == 0 {
        return Exact { u: vec![], s: vec![], v: vec![], squares };
    }
    let (u, left) = factor(level, threads, u, k);
    let (v, right) = factor(level, threads, v, k);
    let mut turned = vec![0.0; k * k];
    transpose(&right, &mut turned, k, k);
    let (s, a, b) = jacobi(&product(level, &left, &turned, k, k, k), k);
    let turn = |q: &[f64], by: &[f64]| {
        let mut out = vec![0.0; q.len()];
        add_product(level, threads, &mut out, q, k, by, k);
        out
    };
    let (mut u, mut v) = (turn(&u, &a), turn(&v, &b));
    // Columns of `a` that belong to zeros are zero: any direction will do there, none is needed.
    for (j, sign) in signs(&v, k).into_iter().enumerate() {
        if sign < 0.0 {
            u.iter_mut().skip(j).step_by(k).for_each(|x| *x = -*x);
            v.iter_mut().skip(j).step_by(k).for_each(|x| *x = -*x);
        }
    }
    Exact { u, s, v, squares }
}

/// What the `k` columns of `v` are to be multiplied by, 1 or -1, so that the largest component of each, the first of such, is positive.
pub(super) fn signs(v: &[f64], k: usize) -> Vec<f64> {
    let mut largest = vec![0.0f64; k];
    for row in v.chunks_exact(k) {
        for (m, &x) in largest.iter_mut().zip(row) {
            *m = if x.abs() > m.abs() { x } else { *m };
        }
    }
    largest.into_iter().map(|m| if m < 0.0 { -1.0 } else { 1.0 }).collect()
}

/// `a = q r` with orthonormal `q`.
fn factor(level: Level, threads: usize, a: Vec<f64>, k: usize) -> (Vec<f64>, Vec<f64>) {
    let times = |q: &[f64], c: &[f64]| {
        let mut out = vec![0.0; q.len()];
        add_product(level, threads, &mut out, q, k, c, k);
        out
    };
    let once = |a: &[f64]| {
        let r = cholesky(&cross(level, threads, a, k, a, k), k, 1e-13)?;
        Some((times(a, &invert_triangle(&r, k)), r))
    };
    if let Some((q, r)) = once(&a)
        && let Some((q, second)) = once(&q)
    {
        return (q, product(level, &second, &r, k, k, k));
    }
    let mut q = a.clone();
    orthonormalise(level, threads, &mut q, k, &[], Philox::new(0, "", FRESH));
    let r = cross(level, threads, &q, k, &a, k);
    (q, r)
}

/// The thin SVD of `u v^T` for tall `u` (`rows x k`) and `v` (`columns x k`): what a sum of low-rank matrices is, its factors side by side.
///
/// # Errors
/// [`Error::Usage`] for [`Rank::Noise`], which needs the elements, and for factors that are not of these sizes or of a matrix without elements.
pub fn recompress(u: &[f32], v: &[f32], rows: usize, columns: usize, k: usize, rank: Rank) -> Result<Triplets> {
    if rank == Rank::Noise {
        return Err(Error::Usage(
            "the noise floor is found from a matrix's elements, not from its factors; name a rank or a share".into(),
        ));
    }
    if rows == 0 || columns == 0 {
        return Err(Error::Usage(format!("a matrix of {rows} x {columns} has no singular values")));
    }
    if rows.checked_mul(k) != Some(u.len()) || columns.checked_mul(k) != Some(v.len()) {
        return Err(Error::Usage(format!(
            "factors of {} and {} elements are not {rows} x {k} and {columns} x {k}",
            u.len(),
            v.len()
        )));
    }
    let double = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
    let small = k.min(rows).min(columns);
    let mut all = if k > rows.min(columns) {
        // More columns than there are directions: the product itself is the smaller problem.
        let mut turned = vec![0.0; columns * k];
        transpose(v, &mut turned, columns, k);
        return wide(&double(u), &turned, rows, columns, k, rank);
    } else {
        finish(Level::current()?, 1, double(u), double(v), k, 0.0)
    };
    all.squares = all.s.iter().map(|s| s * s).sum();
    let r = choose(rank, &all.s, all.squares, None).unwrap_or(small).min(small);
    cut(&mut all, rows, columns, r);
    Ok(all)
}

/// [`recompress`] for factors with more columns than a side has: QR of nothing, but the small side's eigenproblem.
fn wide(u: &[f64], turned: &[f64], rows: usize, columns: usize, k: usize, rank: Rank) -> Result<Triplets> {
    let level = Level::current()?;
    let a = product(level, u, turned, rows, k, columns);
    let small = rows.min(columns);
    let (tall, count) = if rows >= columns {
        (a, rows)
    } else {
        let mut t = vec![0.0; a.len()];
        transpose(&a, &mut t, rows, columns);
        (t, columns)
    };
    let mut identity = vec![0.0; small * small];
    (0..small).for_each(|i| identity[i * small + i] = 1.0);
    let mut all = finish(level, 1, tall, identity, small, 0.0);
    if rows < columns {
        std::mem::swap(&mut all.u, &mut all.v);
    }
    debug_assert_eq!(all.v.len() + all.u.len(), (count + small) * small);
    all.squares = all.s.iter().map(|s| s * s).sum();
    let r = choose(rank, &all.s, all.squares, None).unwrap_or(small).min(small);
    cut(&mut all, rows, columns, r);
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::dispatch;

    fn random(rows: usize, columns: usize, seed: u64) -> Vec<f32> {
        let mut values = vec![0.0f32; rows * columns];
        dispatch::normal(Level::portable(), &mut values, Philox::new(seed, "t", 1), 0, 1.0);
        values
    }

    fn multiplied(u: &[f32], v: &[f32], rows: usize, columns: usize, k: usize) -> Vec<f64> {
        let at = |i: usize, j: usize| (0..k).map(|l| f64::from(u[i * k + l]) * f64::from(v[j * k + l])).sum();
        (0..rows * columns).map(|e| at(e / columns, e % columns)).collect()
    }

    #[test]
    fn factors_side_by_side_are_recompressed_to_the_same_sum() {
        // Also with more factors than a side has directions, and with factors that repeat.
        for (rows, columns, k) in [(60, 45, 7), (20, 50, 30), (50, 20, 30), (33, 1, 2)] {
            let (u, mut v) = (random(rows, k, 1), random(columns, k, 2));
            for row in v.chunks_exact_mut(k) {
                row[k - 1] = row[0];
            }
            let a = multiplied(&u, &v, rows, columns, k);
            let norm = a.iter().map(|x| x * x).sum::<f64>().sqrt();
            let all = recompress(&u, &v, rows, columns, k, Rank::Fixed(k)).expect("fits");
            let mut scaled = all.u.clone();
            for row in scaled.chunks_exact_mut(all.rank) {
                row.iter_mut().zip(&all.s).for_each(|(x, &s)| *x *= s as f32);
            }
            let b = multiplied(&scaled, &all.v, rows, columns, all.rank);
            let off = a.iter().zip(&b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt();
            assert!(off < 2e-6 * norm, "{rows} x {columns}, {k}: {off} of {norm}");
            assert!(all.s.is_sorted_by(|a, b| a >= b));
            let half = recompress(&u, &v, rows, columns, k, Rank::Error(0.5)).expect("fits");
            assert!(half.rank <= all.rank && half.residual <= 0.5 * norm * (1.0 + 1e-9));
        }
        assert!(recompress(&[1.0], &[1.0], 1, 1, 1, Rank::Noise).is_err());
        assert!(recompress(&[1.0], &[1.0], 2, 1, 1, Rank::Fixed(1)).is_err());
    }

    #[test]
    fn a_matrix_without_elements_is_refused_and_one_without_factors_is_zero() {
        for (u, v, rows, columns, k) in [(&[][..], &[1.0][..], 0, 1, 1), (&[1.0], &[], 1, 0, 1), (&[], &[], 0, 0, 2)] {
            let refused = recompress(u, v, rows, columns, k, Rank::Fixed(1)).expect_err("no elements");
            assert!(refused.to_string().contains(&format!("{rows} x {columns}")), "{refused}");
        }
        let none = recompress(&[], &[], 3, 2, 0, Rank::Fixed(1)).expect("zero");
        assert!(none.rank == 0 && none.squares == 0.0 && none.u.is_empty() && none.v.is_empty());
    }
}
