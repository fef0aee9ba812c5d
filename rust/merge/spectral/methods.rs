//! What each method makes of singular values and vectors.
//!
//! Singular values come from Gram matrices in f64, so that those below 1e-8 of the first are lost. What is below [`CUT`] of the first counts as zero:
//! it has no direction that would mean anything, and no method raises it.

use crate::Result;
use crate::bf16::Work;
use crate::linalg::packed::{self, Packed, product};
use crate::linalg::whole::symmetric;
use crate::merge::method::MethodPlan;

use super::panels::{Mix, PANEL, Panels, Piece};

/// Singular values below this share of the first are zero.
const CUT: f64 = 1e-6;

/// A method with its parameters.
#[derive(Debug, Clone)]
pub(super) enum Kind {
    IsoC { lambda: f64 },
    IsoCts { common: f64, lambda: f64 },
    TsvM { rank: Option<f64>, lambda: f64 },
    Star { eta: f64, rank: Option<usize>, lambda: f64 },
    Boost { beta: f64, lambda: f64 },
    Knots { density: Vec<f64>, elect: bool, normalize: bool, lambda: f64 },
}

/// Singular values, descending, and the vectors of the held side, one a row.
struct Side {
    s: Vec<f64>,
    vectors: Vec<f64>,
    /// Values that are not zero.
    kept: usize,
}

impl Side {
    fn of<W: Work>(panels: &Panels<'_, W>, gram: Vec<f64>, n: usize) -> Result<Self> {
        Self::within(panels, gram, n, 0.0)
    }

    /// The same of what is left of a matrix of a norm: what is small beside that is zero too.
    fn within<W: Work>(panels: &Panels<'_, W>, gram: Vec<f64>, n: usize, norm: f64) -> Result<Self> {
        let (values, vectors) = symmetric(panels.level(), panels.threads(), gram, n, panels.control())?;
        let s: Vec<f64> = values.iter().map(|v| v.max(0.0).sqrt()).collect();
        let first = s.first().copied().unwrap_or(0.0).max(norm);
        let kept = s.iter().take_while(|&&s| s > CUT * first).count();
        Ok(Self { s, vectors, kept })
    }

    fn sum(&self) -> f64 {
        self.s.iter().sum()
    }

    /// `sum of gain_i v_i v_i^T` over as many vectors as there are gains.
    fn filter<W: Work>(&self, panels: &Panels<'_, W>, gains: &[f64]) -> Vec<f64> {
        let (n, r) = (self.s.len(), gains.len());
        let mut left = vec![0.0; n * r];
        for (i, (v, g)) in self.vectors.chunks_exact(n.max(1)).zip(gains).enumerate() {
            v.iter().enumerate().for_each(|(k, x)| left[k * r + i] = x * g);
        }
        product(panels.level(), panels.threads(), &left, &self.vectors[..r * n], [n, r, n])
    }

    /// The first `r` vectors as columns, each times a gain.
    fn columns(&self, r: usize, gain: impl Fn(f64) -> f64) -> Vec<f64> {
        let n = self.s.len();
        let mut found = vec![0.0; n * r];
        for (i, v) in self.vectors.chunks_exact(n.max(1)).take(r.min(self.kept)).enumerate() {
            let g = gain(self.s[i]);
            v.iter().enumerate().for_each(|(k, x)| found[k * r + i] = x * g);
        }
        found
    }

    /// The first `r` values, zeros where there are none.
    fn values(&self, r: usize) -> impl Iterator<Item = f64> {
        self.s.iter().enumerate().take(r).map(|(i, &s)| if i < self.kept { s } else { 0.0 })
    }
}

/// The inverse square root of a Gram matrix, of those directions that are not zero.
fn inverse_root<W: Work>(panels: &Panels<'_, W>, gram: Vec<f64>, n: usize) -> Result<Vec<f64>> {
    let side = Side::of(panels, gram, n)?;
    let gains: Vec<f64> = side.s[..side.kept].iter().map(|s| 1.0 / s).collect();
    Ok(side.filter(panels, &gains))
}

/// The Frobenius norm of a matrix, from its Gram matrix.
fn norm_of(gram: &[f64], n: usize) -> f64 {
    gram.iter().step_by(n + 1).sum::<f64>().sqrt()
}

fn only(tasks: usize, i: usize, c: f64) -> Mix {
    (0..tasks).map(|j| if i == j { c } else { 0.0 }).collect()
}

fn turned(a: &[f64], rows: usize, columns: usize) -> Vec<f64> {
    let mut t = vec![0.0; a.len()];
    crate::linalg::dense::transpose(a, &mut t, rows, columns);
    t
}

impl Kind {
    pub(super) fn new(plan: &MethodPlan) -> Option<Self> {
        Some(match plan.clone() {
            MethodPlan::IsoC { lambda } => Self::IsoC { lambda },
            MethodPlan::IsoCts { common, lambda } => Self::IsoCts { common, lambda },
            MethodPlan::TsvM { rank, lambda } => Self::TsvM { rank, lambda },
            MethodPlan::Star { eta, rank, lambda } => Self::Star { eta, rank, lambda },
            MethodPlan::Boost { beta, lambda } => Self::Boost { beta, lambda },
            MethodPlan::Knots { density, elect, normalize, lambda } => {
                Self::Knots { density, elect, normalize, lambda }
            }
            _ => return None,
        })
    }

    /// How often the task vectors are read to make an update.
    pub(super) fn readings(&self, tasks: usize) -> u64 {
        match self {
            Self::IsoC { .. } | Self::Boost { .. } => 2,
            Self::Star { .. } => tasks as u64 + 1,
            Self::TsvM { .. } => tasks as u64 + 2,
            Self::IsoCts { .. } => tasks as u64 + 3,
            Self::Knots { density, .. } => {
                if density.iter().all(|&d| d >= 1.0) {
                    2
                } else {
                    3
                }
            }
        }
    }

    /// Bytes besides the update while it is made, of a matrix of so many rows and columns.
    pub(super) fn memory(&self, rows: usize, columns: usize, tasks: usize) -> u64 {
        let (n, t) = (rows.min(columns) as u64, tasks as u64);
        // Squares of the smaller side; panels of the task vectors, of their sums and of what is made of them.
        let (squares, side, panels) = match self {
            Self::IsoC { .. } | Self::Boost { .. } => (5, n, t + 6),
            Self::Star { .. } => (5 + 2 * t, n, 2 * t + 5),
            Self::TsvM { .. } => (11, n, 2 * t + 6),
            Self::IsoCts { .. } => (14, n, 2 * t + 7),
            Self::Knots { density, .. } => {
                let (rows, all) = (rows as u64, columns as u64 * t);
                let side = rows.min(all);
                let chosen = if density.iter().all(|&d| d >= 1.0) { 0 } else { t * side * columns as u64 };
                return 8 * (chosen + 8 * side * side + (3 * t + 6) * PANEL as u64 * side);
            }
        };
        8 * (squares * side * side + panels * PANEL as u64 * side)
    }

    /// The update of a matrix, in the tensor's own order.
    pub(super) fn update<W: Work, O: Work>(&self, panels: &Panels<'_, W>, weights: &[f64]) -> Result<Vec<O>> {
        match *self {
            Self::IsoC { lambda } => {
                let side = whole(panels, weights)?;
                let mean = side.sum() / side.s.len() as f64;
                let gains: Vec<f64> = side.s[..side.kept].iter().map(|s| lambda * mean / s).collect();
                filtered(panels, weights, side, &gains)
            }
            Self::Boost { beta, lambda } => {
                let side = whole(panels, weights)?;
                let floor = side.s.get(reaching(&side.s, beta)).copied().unwrap_or(0.0);
                let gains: Vec<f64> = side.s[..side.kept].iter().map(|&s| lambda * s.max(floor) / s).collect();
                filtered(panels, weights, side, &gains)
            }
            Self::Star { eta, rank, lambda } => star(panels, weights, eta, rank, lambda),
            Self::TsvM { rank, lambda } => tsv_m(panels, weights, rank, lambda),
            Self::IsoCts { common, lambda } => iso_cts(panels, weights, common, lambda),
            Self::Knots { ref density, elect, normalize, lambda } => {
                knots(panels, &Choice { weights, density, elect, normalize, lambda })
            }
        }
    }
}

/// The first place at which the sum of values so far reaches a share of their sum.
fn reaching(values: &[f64], share: f64) -> usize {
    let total: f64 = values.iter().sum();
    let mut sum = 0.0;
    let found = values.iter().position(|v| {
        sum += v;
        sum >= share * total
    });
    found.unwrap_or(values.len().saturating_sub(1))
}

/// Singular values and vectors of the weighted sum of the task vectors.
fn whole<W: Work>(panels: &Panels<'_, W>, weights: &[f64]) -> Result<Side> {
    let mut gram = panels.products(&[(weights.to_vec(), weights.to_vec())])?;
    Side::of(panels, gram.swap_remove(0), panels.side())
}

/// The weighted sum of the task vectors with every singular value times a gain.
fn filtered<W: Work, O: Work>(panels: &Panels<'_, W>, weights: &[f64], side: Side, gains: &[f64]) -> Result<Vec<O>> {
    let n = panels.side();
    let matrix = side.filter(panels, gains);
    drop(side);
    panels.update(&[Piece { mix: weights.to_vec(), matrix, columns: n, at: 0 }], None)
}

/// Singular values and vectors of one task vector, times its weight.
fn task<W: Work>(panels: &Panels<'_, W>, weights: &[f64], i: usize) -> Result<Side> {
    let mix = only(weights.len(), i, weights[i]);
    let mut gram = panels.products(&[(mix.clone(), mix)])?;
    Side::of(panels, gram.swap_remove(0), panels.side())
}

fn star<W: Work, O: Work>(
    panels: &Panels<'_, W>,
    weights: &[f64],
    eta: f64,
    rank: Option<usize>,
    lambda: f64,
) -> Result<Vec<O>> {
    let n = panels.side();
    let mut pieces = Vec::with_capacity(weights.len());
    for (i, &w) in weights.iter().enumerate() {
        let side = task(panels, &vec![1.0; weights.len()], i)?;
        let r = rank.unwrap_or(reaching(&side.s, eta) + 1).min(side.kept);
        let rescale = side.sum() / side.s[..r].iter().sum::<f64>();
        let matrix = side.filter(panels, &vec![rescale; r]);
        pieces.push(Piece { mix: only(weights.len(), i, lambda * w), matrix, columns: n, at: 0 });
    }
    panels.update(&pieces, None)
}

fn tsv_m<W: Work, O: Work>(panels: &Panels<'_, W>, weights: &[f64], rank: Option<f64>, lambda: f64) -> Result<Vec<O>> {
    let (n, tasks) = (panels.side(), weights.len());
    let share = rank.unwrap_or(1.0 / tasks as f64);
    // The share's own rounding must not cost a vector.
    let r = ((n as f64 * share + 1e-9) as usize).clamp(1, (n / tasks).max(1));
    let mut pieces = Vec::with_capacity(tasks);
    let (mut own, mut s) = (vec![0.0; n * r * tasks], Vec::with_capacity(r * tasks));
    for i in 0..tasks {
        let side = task(panels, weights, i)?;
        let columns = side.columns(r, |_| 1.0);
        for (into, from) in own.chunks_exact_mut(r * tasks).zip(columns.chunks_exact(r)) {
            into[i * r..(i + 1) * r].copy_from_slice(from);
        }
        s.extend(side.values(r));
        let matrix = side.columns(r, |s| 1.0 / s);
        pieces.push(Piece { mix: only(tasks, i, weights[i]), matrix, columns: r, at: i * r });
    }
    let scaled: Vec<f64> = s.iter().map(|s| lambda * s).collect();
    orthogonal(panels, &pieces, &own, &scaled)
}

/// `polar(F) diag(s) polar(E)^T`, with `F` made of pieces and `E` (`side x s`) on the held side: singular vectors of several matrices side by side, made
/// orthonormal as little as possible (Procrustes).
fn orthogonal<W: Work, O: Work>(panels: &Panels<'_, W>, pieces: &[Piece], own: &[f64], s: &[f64]) -> Result<Vec<O>> {
    let (level, threads) = (panels.level(), panels.threads());
    let (n, width) = (panels.side(), s.len());
    let across = turned(own, n, width);
    let gram = product(level, threads, &across, own, [width, n, width]);
    let mut last = product(level, threads, &inverse_root(panels, gram, width)?, &across, [width, width, n]);
    drop(across);
    for (row, s) in last.chunks_exact_mut(n).zip(s) {
        row.iter_mut().for_each(|x| *x *= s);
    }
    let root = inverse_root(panels, panels.gram(pieces, width)?, width)?;
    let last = product(level, threads, &root, &last, [width, width, n]);
    drop(root);
    panels.update(pieces, Some((&last, width)))
}

fn iso_cts<W: Work, O: Work>(panels: &Panels<'_, W>, weights: &[f64], share: f64, lambda: f64) -> Result<Vec<O>> {
    let (level, threads) = (panels.level(), panels.threads());
    let (n, tasks) = (panels.side(), weights.len());
    // As many directions for every task, the rest for the common space.
    let mut each = ((n - (n as f64 * share) as usize) as f64 / tasks as f64).round_ties_even() as usize;
    while each * tasks > n {
        each -= 1;
    }
    let common = n - each * tasks;
    let all = whole(panels, weights)?;
    let (mut own, mut s) = (vec![0.0; n * n], Vec::with_capacity(n));
    let mut put = |columns: &[f64], r: usize, at: usize| {
        for (into, from) in own.chunks_exact_mut(n).zip(columns.chunks_exact(r.max(1))) {
            into[at..at + r].copy_from_slice(from);
        }
    };
    let mut pieces = Vec::with_capacity(tasks + 1);
    // What the pieces of the tasks take back of the sum: the part of their long vectors in the common space.
    let mut taken = vec![0.0; n * n];
    let kept = common.min(all.kept);
    let space = &all.vectors[..kept * n];
    for i in 0..tasks {
        let mix = only(tasks, i, weights[i]);
        let side;
        if panels.turned() {
            // The common space is on the held side: P G P with P = 1 - U U^T.
            let gram = panels.products(&[(mix.clone(), mix.clone())])?.swap_remove(0);
            let norm = norm_of(&gram, n);
            let mut rest = all.filter(panels, &vec![-1.0; kept]);
            (0..n).for_each(|k| rest[k * n + k] += 1.0);
            let half = product(level, threads, &gram, &rest, [n, n, n]);
            side = Side::within(panels, product(level, threads, &rest, &half, [n, n, n]), n, norm)?;
        } else {
            // It is on the other side: G - Y^T Y with Y = U^T d = S^-1 V^T M^T d.
            let mut both = panels.products(&[(mix.clone(), mix.clone()), (weights.to_vec(), mix.clone())])?.into_iter();
            let (mut gram, cross) = (both.next().unwrap_or_default(), both.next().unwrap_or_default());
            let norm = norm_of(&gram, n);
            let mut y = product(level, threads, space, &cross, [kept, n, n]);
            for (row, s) in y.chunks_exact_mut(n).zip(&all.s) {
                row.iter_mut().for_each(|x| *x /= s);
            }
            let minus: Vec<f64> = turned(&y, kept, n).iter().map(|x| -x).collect();
            let less = product(level, threads, &minus, &y, [n, kept, n]);
            gram.iter_mut().zip(&less).for_each(|(g, l)| *g += l);
            side = Side::within(panels, gram, n, norm)?;
            // -V S^-1 Y v / s, for each v of the task.
            let vectors = side.columns(each, |s| 1.0 / s);
            let mut inside = product(level, threads, &y, &vectors, [kept, n, each]);
            for (row, s) in inside.chunks_exact_mut(each.max(1)).zip(&all.s) {
                row.iter_mut().for_each(|x| *x /= -s);
            }
            let back = product(level, threads, &turned(space, kept, n), &inside, [n, kept, each]);
            for (into, from) in taken.chunks_exact_mut(n).zip(back.chunks_exact(each.max(1))) {
                into[i * each..(i + 1) * each].copy_from_slice(from);
            }
        }
        put(&side.columns(each, |_| 1.0), each, i * each);
        s.extend(side.values(each));
        let matrix = side.columns(each, |s| 1.0 / s);
        pieces.push(Piece { mix, matrix, columns: each, at: i * each });
    }
    put(&all.columns(common, |_| 1.0), common, each * tasks);
    s.extend(all.values(common));
    for (into, from) in taken.chunks_exact_mut(n).zip(all.columns(common, |s| 1.0 / s).chunks_exact(common.max(1))) {
        into[each * tasks..].copy_from_slice(from);
    }
    drop(all);
    pieces.push(Piece { mix: weights.to_vec(), matrix: taken, columns: n, at: 0 });
    let mean = lambda * s.iter().sum::<f64>() / n as f64;
    orthogonal(panels, &pieces, &own, &vec![mean; n])
}

/// How the aligned parts of the tasks are merged.
struct Choice<'a> {
    weights: &'a [f64],
    density: &'a [f64],
    elect: bool,
    normalize: bool,
    lambda: f64,
}

impl Choice<'_> {
    /// Merges parts, element by element, of which those below a floor are left out, into the first of them.
    fn merge(&self, parts: &mut [Vec<f64>], floors: &[f64]) {
        let (first, rest) = parts.split_at_mut(1);
        for (e, into) in first[0].iter_mut().enumerate() {
            let part = |j: usize, own: f64| {
                let y = if j == 0 { own } else { rest[j - 1][e] };
                if y.abs() >= floors[j] { self.weights[j] * y } else { 0.0 }
            };
            let own = *into;
            let sum: f64 = (0..self.weights.len()).map(|j| part(j, own)).sum();
            let (mut total, mut share) = (0.0, 0.0);
            for (j, &w) in self.weights.iter().enumerate() {
                let y = part(j, own);
                if !self.elect || (y != 0.0 && (y > 0.0) == (sum >= 0.0)) {
                    total += y;
                    share += w;
                }
            }
            let by = if self.normalize && share.abs() >= 1e-8 { share } else { 1.0 };
            *into = self.lambda * total / by;
        }
    }

    /// The smallest magnitude that stays in each part, from all magnitudes of it.
    fn floor(&self, j: usize, mut magnitudes: Vec<f64>) -> f64 {
        let keep = (self.density[j] * magnitudes.len() as f64) as usize;
        if keep == 0 {
            return f64::INFINITY;
        }
        if keep >= magnitudes.len() {
            return 0.0;
        }
        *magnitudes.select_nth_unstable_by(keep - 1, |a, b| b.total_cmp(a)).1
    }
}

/// `[d_1 | ... | d_n] = U S [V_1 | ... | V_n]^T`; the parts `S V_i^T` are merged, and `U` times what comes of it is the update.
fn knots<W: Work, O: Work>(panels: &Panels<'_, W>, choice: &Choice<'_>) -> Result<Vec<O>> {
    let tasks = choice.weights.len();
    let (rows, columns) = (panels.rows(), panels.columns());
    if rows <= columns * tasks {
        knots_by_rows(&panels.turn(true), choice)
    } else {
        knots_by_columns(&panels.turn(false), choice)
    }
}

/// From `sum of d_i d_i^T`, whose eigenvectors are `U`: the parts are `U^T d_i`, column by column.
fn knots_by_rows<W: Work, O: Work>(panels: &Panels<'_, W>, choice: &Choice<'_>) -> Result<Vec<O>> {
    let (level, threads) = (panels.level(), panels.threads());
    let (m, tasks) = (panels.side(), choice.weights.len());
    let mixes: Vec<Mix> = (0..tasks).map(|i| only(tasks, i, 1.0)).collect();
    let mut gram = vec![0.0; m * m];
    panels.each(&mixes, |_, panel| {
        for d in panel {
            packed::add_cross(level, threads, &mut gram, (d, m), (d, m), true);
        }
        Ok(())
    })?;
    packed::mirror(&mut gram, m);
    let side = Side::of(panels, gram, m)?;
    let r = side.kept;
    let basis = side.columns(r, |_| 1.0);
    drop(side);
    let packed = Packed::new(&basis, m, r);
    let parts_of = |panel: &[Vec<f64>]| -> Vec<Vec<f64>> {
        panel
            .iter()
            .map(|d| {
                let mut y = vec![0.0; d.len() / m * r];
                packed::add(level, threads, &mut y, d, &packed, false);
                y
            })
            .collect()
    };
    let mut floors = vec![0.0; tasks];
    if choice.density.iter().any(|&d| d < 1.0) {
        let mut magnitudes = vec![Vec::with_capacity(r * panels.columns()); tasks];
        panels.each(&mixes, |_, panel| {
            for (all, part) in magnitudes.iter_mut().zip(parts_of(panel)) {
                all.extend(part.iter().map(|y| y.abs()));
            }
            Ok(())
        })?;
        floors = magnitudes.into_iter().enumerate().map(|(j, all)| choice.floor(j, all)).collect();
    }
    let back = Packed::new(&turned(&basis, m, r), r, m);
    drop(basis);
    let mut update = vec![O::ZERO; m * panels.columns()];
    panels.each(&mixes, |range, panel| {
        let mut parts = parts_of(panel);
        choice.merge(&mut parts, &floors);
        let mut whole = vec![0.0; range.len() * m];
        packed::add(level, threads, &mut whole, &parts[0], &back, false);
        panels.put(&mut update, range, &whole);
        Ok(())
    })?;
    Ok(update)
}

/// From `[d_i^T d_j]`, whose eigenvectors are the `V_i` one below the other: `U` is `sum of d_i V_i S^-1`.
fn knots_by_columns<W: Work, O: Work>(panels: &Panels<'_, W>, choice: &Choice<'_>) -> Result<Vec<O>> {
    let (level, threads) = (panels.level(), panels.threads());
    let (n, tasks) = (panels.side(), choice.weights.len());
    let pairs: Vec<(usize, usize)> = (0..tasks).flat_map(|i| (i..tasks).map(move |j| (i, j))).collect();
    let mixes: Vec<(Mix, Mix)> = pairs.iter().map(|&(i, j)| (only(tasks, i, 1.0), only(tasks, j, 1.0))).collect();
    let blocks = panels.products(&mixes)?;
    let wide = n * tasks;
    let mut gram = vec![0.0; wide * wide];
    for ((i, j), block) in pairs.into_iter().zip(blocks) {
        for a in 0..n {
            for b in 0..n {
                gram[(i * n + a) * wide + j * n + b] = block[a * n + b];
                gram[(j * n + b) * wide + i * n + a] = block[a * n + b];
            }
        }
    }
    let side = Side::of(panels, gram, wide)?;
    let r = side.kept;
    // S V_i^T, r x n each.
    let part = |i: usize, gain: &dyn Fn(f64) -> f64| -> Vec<f64> {
        let mut y = vec![0.0; r * n];
        for (k, (y, v)) in y.chunks_exact_mut(n).zip(side.vectors.chunks_exact(wide)).enumerate() {
            let g = gain(side.s[k]);
            y.iter_mut().zip(&v[i * n..(i + 1) * n]).for_each(|(y, v)| *y = g * v);
        }
        y
    };
    let mut parts: Vec<Vec<f64>> = (0..tasks).map(|i| part(i, &|s| s)).collect();
    let floors: Vec<f64> =
        (0..tasks)
            .map(|j| {
                if choice.density[j] >= 1.0 { 0.0 } else { choice.floor(j, parts[j].iter().map(|y| y.abs()).collect()) }
            })
            .collect();
    choice.merge(&mut parts, &floors);
    parts.truncate(1);
    let pieces: Vec<Piece> = (0..tasks)
        .map(|i| {
            let inverse = part(i, &|s| 1.0 / s);
            let matrix = product(level, threads, &turned(&inverse, r, n), &parts[0], [n, r, n]);
            Piece { mix: only(tasks, i, 1.0), matrix, columns: n, at: 0 }
        })
        .collect();
    drop((parts, side));
    panels.update(&pieces, None)
}
