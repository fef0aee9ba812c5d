//! Eigenproblems of symmetric matrices in memory, and the singular values of small ones.

/// Eigenvalues, descending, and eigenvectors, one a row, of a symmetric matrix of `n` rows.
///
/// Householder reduction and the implicit QL iteration (EISPACK's tred2 and tql2), with the vectors held as rows so that rotations go along memory.
/// The signs are those of the largest component: positive.
pub fn symmetric(a: &[f64], n: usize) -> (Vec<f64>, Vec<f64>) {
    symmetric_until(a, n, &|| false).unwrap_or_default()
}

/// [`symmetric`] of large matrices: nothing once `stop` says so.
pub(super) fn symmetric_until(a: &[f64], n: usize, stop: &dyn Fn() -> bool) -> Option<(Vec<f64>, Vec<f64>)> {
    if n == 0 {
        return Some((vec![], vec![]));
    }
    let mut z = a.to_vec();
    let (mut d, mut e) = reduce(&mut z, n, true, stop)?;
    iterate(&mut d, &mut e, stop, |from, turns| turn(&mut z, n, from, turns))?;
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&i, &j| d[j].total_cmp(&d[i]).then(i.cmp(&j)));
    let mut vectors = Vec::with_capacity(n * n);
    for &i in &order {
        let row = &z[i * n..(i + 1) * n];
        let largest = row.iter().fold(0.0f64, |m, &x| if x.abs() > m.abs() { x } else { m });
        vectors.extend(row.iter().map(|&x| if largest < 0.0 { -x } else { x }));
    }
    Some((order.iter().map(|&i| d[i]).collect(), vectors))
}

/// Eigenvalues alone of a tridiagonal matrix, descending.
pub fn tridiagonal(d: Vec<f64>, e: Vec<f64>) -> Vec<f64> {
    tridiagonal_until(d, e, &|| false).unwrap_or_default()
}

fn tridiagonal_until(mut d: Vec<f64>, mut e: Vec<f64>, stop: &dyn Fn() -> bool) -> Option<Vec<f64>> {
    iterate(&mut d, &mut e, stop, |_, _| ())?;
    d.sort_by(|a, b| b.total_cmp(a));
    Some(d)
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut lanes = [0.0; 8];
    let (x, y) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    for (x, y) in x.0.iter().zip(y.0) {
        for j in 0..8 {
            lanes[j] += x[j] * y[j];
        }
    }
    let rest: f64 = x.1.iter().zip(y.1).map(|(a, b)| a * b).sum();
    ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7])) + rest
}

/// Householder's reduction to a tridiagonal matrix: its diagonal, and below it (`e[0]` is zero). With `vectors`, `z` becomes the transformation, one
/// column of it a row.
fn reduce(z: &mut [f64], n: usize, vectors: bool, stop: &dyn Fn() -> bool) -> Option<(Vec<f64>, Vec<f64>)> {
    let (mut d, mut e) = (vec![0.0; n], vec![0.0; n]);
    let mut reflectors: Vec<Vec<f64>> = vec![vec![]; n];
    let mut p = vec![0.0; n];
    for i in (1..n).rev() {
        if stop() {
            return None;
        }
        let (above, row) = z.split_at_mut(i * n);
        let row = &mut row[..i];
        let scale: f64 = row.iter().map(|x| x.abs()).sum();
        let tail: f64 = row[..i - 1].iter().map(|x| x.abs()).sum();
        if tail == 0.0 {
            e[i] = row[i - 1];
            continue;
        }
        let mut u: Vec<f64> = row.iter().map(|x| x / scale).collect();
        let mut h = dot(&u, &u);
        let f = u[i - 1];
        let g = if f >= 0.0 { -h.sqrt() } else { h.sqrt() };
        e[i] = scale * g;
        h -= f * g;
        u[i - 1] = f - g;
        // p = A u / h from the lower triangle alone, row by row.
        p[..i].fill(0.0);
        for j in 0..i {
            let line = &above[j * n..j * n + j];
            let (x, mut sum) = (u[j], 0.0);
            sum += dot(line, &u[..j]);
            for (p, &a) in p.iter_mut().zip(line) {
                *p += a * x;
            }
            p[j] += sum + above[j * n + j] * x;
        }
        p[..i].iter_mut().for_each(|p| *p /= h);
        let k = dot(&p[..i], &u) / (h + h);
        p[..i].iter_mut().zip(&u).for_each(|(p, u)| *p -= k * u);
        for j in 0..i {
            let (x, y) = (u[j], p[j]);
            for ((a, &u), &p) in above[j * n..=j * n + j].iter_mut().zip(&u).zip(&p) {
                *a -= x * p + y * u;
            }
        }
        if vectors {
            let root = h.sqrt();
            u.iter_mut().for_each(|u| *u /= root);
            reflectors[i] = u;
        }
    }
    for i in 0..n {
        d[i] = z[i * n + i];
    }
    if vectors {
        z.fill(0.0);
        for i in 0..n {
            z[i * n + i] = 1.0;
        }
        // Q = H(n-1) ... H(1); rows of z are the columns of Q, and each of them is reflected from the last reflector outward.
        for reflector in &reflectors {
            if stop() {
                return None;
            }
            if reflector.is_empty() {
                continue;
            }
            for row in z.chunks_exact_mut(n) {
                let row = &mut row[..reflector.len()];
                let k = dot(row, reflector);
                if k != 0.0 {
                    row.iter_mut().zip(reflector).for_each(|(x, u)| *x -= k * u);
                }
            }
        }
    }
    Some((d, e))
}

/// The implicit QL iteration on a tridiagonal matrix, `e[i]` beside `d[i - 1]` and `d[i]`. `turned` is told the rotations of every sweep, each
/// a cosine and a sine: of vectors `from` and `from + 1`, then of the two before, and so on. Nothing once `stop` says so.
pub(super) fn iterate(
    d: &mut [f64],
    e: &mut [f64],
    stop: &dyn Fn() -> bool,
    mut turned: impl FnMut(usize, &[[f64; 2]]),
) -> Option<()> {
    let n = d.len();
    e.rotate_left(1);
    e[n - 1] = 0.0;
    let mut turns = Vec::with_capacity(n);
    for l in 0..n {
        // Thirty turns are more than any matrix of floats has been seen to need; the bound keeps hostile numbers from going round for ever.
        for _ in 0..60 {
            if stop() {
                return None;
            }
            let m = (l..n - 1).find(|&m| e[m].abs() <= f64::EPSILON * (d[m].abs() + d[m + 1].abs())).unwrap_or(n - 1);
            if m == l {
                break;
            }
            let mut g = (d[l + 1] - d[l]) / (2.0 * e[l]);
            let mut r = (g * g + 1.0).sqrt();
            g = d[m] - d[l] + e[l] / (g + if g >= 0.0 { r } else { -r });
            let (mut s, mut c, mut p) = (1.0, 1.0, 0.0);
            let mut early = false;
            turns.clear();
            for i in (l..m).rev() {
                let f = s * e[i];
                let b = c * e[i];
                r = (f * f + g * g).sqrt();
                e[i + 1] = r;
                if r == 0.0 {
                    d[i + 1] -= p;
                    e[m] = 0.0;
                    early = true;
                    break;
                }
                s = f / r;
                c = g / r;
                g = d[i + 1] - p;
                r = (d[i] - g) * s + 2.0 * c * b;
                p = s * r;
                d[i + 1] = g + p;
                g = c * r - b;
                turns.push([c, s]);
            }
            turned(m - 1, &turns);
            if early {
                continue;
            }
            d[l] -= p;
            e[l] = g;
            e[m] = 0.0;
        }
    }
    Some(())
}

/// Turns rows of `z` (`n` each), as [`iterate`] says.
fn turn(z: &mut [f64], n: usize, from: usize, turns: &[[f64; 2]]) {
    for (i, &[c, s]) in (0..=from).rev().zip(turns) {
        let (low, high) = z.split_at_mut((i + 1) * n);
        for (a, b) in low[i * n..].iter_mut().zip(&mut high[..n]) {
            let f = *b;
            *b = s * *a + c * f;
            *a = c * *a - s * f;
        }
    }
}

/// Singular values, descending, of a small square matrix, with its left and right vectors as columns: one-sided Jacobi, which finds small
/// values as exactly as large ones.
pub fn jacobi(a: &[f64], n: usize) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    // Rows of `w` are the columns of `a`, turned; rows of `v` the columns of the rotation.
    let mut w = vec![0.0; n * n];
    super::dense::transpose(a, &mut w, n, n);
    let mut v = vec![0.0; n * n];
    (0..n).for_each(|i| v[i * n + i] = 1.0);
    for _ in 0..40 {
        let mut turned = false;
        for i in 0..n {
            for j in i + 1..n {
                let (x, y) = (dot(&w[i * n..][..n], &w[i * n..][..n]), dot(&w[j * n..][..n], &w[j * n..][..n]));
                let xy = dot(&w[i * n..][..n], &w[j * n..][..n]);
                if xy == 0.0 || xy.abs() <= 1e-15 * (x * y).sqrt() {
                    continue;
                }
                turned = true;
                let zeta = (y - x) / (2.0 * xy);
                let root = zeta.abs() + (1.0 + zeta * zeta).sqrt();
                let t = if zeta >= 0.0 { 1.0 / root } else { -1.0 / root };
                let c = 1.0 / (1.0 + t * t).sqrt();
                let s = c * t;
                for m in [&mut w, &mut v] {
                    let (low, high) = m.split_at_mut(j * n);
                    for (a, b) in low[i * n..(i + 1) * n].iter_mut().zip(&mut high[..n]) {
                        (*a, *b) = (c * *a - s * *b, s * *a + c * *b);
                    }
                }
            }
        }
        if !turned {
            break;
        }
    }
    let norms: Vec<f64> = w.chunks_exact(n.max(1)).map(|r| dot(r, r).sqrt()).collect();
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&i, &j| norms[j].total_cmp(&norms[i]).then(i.cmp(&j)));
    let (mut left, mut right) = (vec![0.0; n * n], vec![0.0; n * n]);
    for (to, &from) in order.iter().enumerate() {
        for k in 0..n {
            left[k * n + to] = if norms[from] > 0.0 { w[from * n + k] / norms[from] } else { 0.0 };
            right[k * n + to] = v[from * n + k];
        }
    }
    (order.iter().map(|&i| norms[i]).collect(), left, right)
}

/// Eigenvalues alone of a symmetric matrix, descending; nothing once `stop` says so.
pub(super) fn values(mut a: Vec<f64>, n: usize, stop: &dyn Fn() -> bool) -> Option<Vec<f64>> {
    let (d, e) = reduce(&mut a, n, false, stop)?;
    drop(a);
    tridiagonal_until(d, e, stop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::philox::Philox;
    use crate::simd::{Level, dispatch};

    fn symmetric_matrix(n: usize) -> Vec<f64> {
        let mut a = vec![0.0; n * n];
        dispatch::normal(Level::portable(), &mut a, Philox::new(9, "s", 1), 0, 1.0);
        (0..n * n).map(|e| a[e] + a[e % n * n + e / n]).collect()
    }

    #[test]
    fn eigenpairs_are_eigenpairs() {
        for n in [1, 2, 3, 17, 80] {
            let a = symmetric_matrix(n);
            let (values, vectors) = symmetric(&a, n);
            for (value, v) in values.iter().zip(vectors.chunks_exact(n)) {
                assert!((dot(v, v) - 1.0).abs() < 1e-12);
                for i in 0..n {
                    assert!((dot(&a[i * n..(i + 1) * n], v) - value * v[i]).abs() < 1e-11 * (n as f64));
                }
            }
            assert!(values.is_sorted_by(|a, b| a >= b));
        }
        assert_eq!(symmetric(&[0.0; 9], 3).0, [0.0; 3]);
        assert_eq!(symmetric(&[2.0, 0.0, 0.0, 5.0], 2).0, [5.0, 2.0]);
    }

    #[test]
    fn jacobi_finds_small_values_as_exactly_as_large_ones() {
        // Columns of lengths from 1 to 1e-12, at right angles but for a rotation of the rows.
        let n = 5;
        let (c, s) = (0.6, 0.8);
        let mut a = vec![0.0; n * n];
        for j in 0..n {
            let length = 10f64.powi(-3 * j as i32);
            a[j * n + j] = c * length;
            a[(j + 1) % n * n + j] += s * length;
        }
        let (values, u, v) = jacobi(&a, n);
        let mut back = vec![0.0; n * n];
        for i in 0..n {
            for j in 0..n {
                back[i * n + j] = (0..n).map(|k| u[i * n + k] * values[k] * v[j * n + k]).sum();
            }
        }
        for j in 0..n {
            let off: f64 = (0..n).map(|i| (back[i * n + j] - a[i * n + j]).powi(2)).sum::<f64>().sqrt();
            assert!(off < 1e-14 * 10f64.powi(-3 * j as i32) + 1e-17, "column {j}: {off}");
        }
        let product: f64 = values.iter().product();
        let determinant = (c.powi(5) + s.powi(5)) * 1e-30;
        assert!((product / determinant - 1.0).abs() < 1e-12);
    }
}
