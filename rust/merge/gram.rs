//! The gram family: one pass for the products of the inputs with each other, coefficients solved from them in f64, one linear pass.
//!
//! The inputs `v_i` are the models, or what they differ by from a base. `G[i][j]` is the sum of `v_i * v_j` in the order of
//! [`kernel::dot`](crate::simd::kernel::dot), MICRO by MICRO and BLOCK by BLOCK; then `u = c_1 v_1 + c_2 v_2 + ...` in the order of the models,
//! every `c_i` rounded once from f64 to the work type. A tensor is one vector, or each of its rows is (whose sums start anew at its first
//! element), or each of its columns (whose products are made and added in f64, row after row).

use std::ops::Range;
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::bf16::Work;
use crate::simd::dispatch::{self, LANES, MICRO, join};
use crate::stream::{BLOCK, Control, Tile, Turn};
use crate::{Error, Result};

use super::method::{MethodPlan, Shape, Worker};
use super::points::{Lanes, Opened, Points, Update};
use super::prepare::Job;

/// A vector's coefficients, from products with each other (row by row, symmetric).
type Products<'a> = &'a [Vec<f64>];

/// Vectors with a cosine beyond this, of either sign, are parallel for slerp.
const SLERP_LINE: f64 = 0.9995;
/// A finer cut: there the sine is 4e-5, and both formulas give the same f32.
const NUSLERP_LINE: f64 = 1.0 - 1e-9;

/// How coefficients are solved.
#[derive(Debug, Clone, Copy)]
enum Solver {
    Slerp { t: f64, parallel: f64 },
    Multislerp { eps: f64 },
    Karcher { max_iter: usize, tol: f64 },
    ModelStock { floor: f64 },
}

/// What one vector is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unit {
    Tensor,
    Row(u64),
    Column(u64),
}

/// The method at work on one tensor.
#[derive(Debug)]
pub(super) struct Gram {
    solver: Solver,
    weights: Vec<f64>,
    unit: Unit,
    elements: u64,
    /// Pairs of each block; coefficients of each row; sums of each column.
    gathered: Mutex<Vec<Vec<f64>>>,
    /// For columns, whose sums run through all blocks in order.
    turn: Turn,
    solved: OnceLock<Vec<Vec<f64>>>,
}

fn pairs(n: usize) -> usize {
    n * (n + 1) / 2
}

fn square(n: usize, pairs: impl Fn(usize) -> f64) -> Vec<Vec<f64>> {
    let place = |i: usize, j: usize| i.min(j) * n - i.min(j) * (i.min(j) + 1) / 2 + i.max(j);
    (0..n).map(|i| (0..n).map(|j| pairs(place(i, j))).collect()).collect()
}

fn normalized(weights: &[f64], name: &str) -> Result<Vec<f64>> {
    let total = weights.iter().fold(0.0, |sum, w| sum + w);
    if total == 0.0 {
        return Err(Error::mismatch(name, format!("the weights {weights:?} add up to zero, so they have no mean")));
    }
    Ok(weights.iter().map(|w| w / total).collect())
}

impl Gram {
    /// The method, if it is one of this family.
    pub(super) fn new(plan: &MethodPlan, weights: &[f64], shape: Shape<'_>) -> Result<Option<Self>> {
        let mut weights = weights.to_vec();
        let row = shape.row();
        let (solver, unit) = match *plan {
            MethodPlan::Slerp { t } => (Solver::Slerp { t, parallel: SLERP_LINE }, Unit::Tensor),
            MethodPlan::Nuslerp { row_wise, flatten } => {
                let t = normalized(&weights, shape.name)?[1];
                let unit = match (flatten || row >= shape.elements, row_wise) {
                    (true, _) => Unit::Tensor,
                    (false, true) => Unit::Row(row),
                    (false, false) => Unit::Column(row),
                };
                (Solver::Slerp { t, parallel: NUSLERP_LINE }, unit)
            }
            MethodPlan::Multislerp { normalize_weights, eps } => {
                if normalize_weights {
                    weights = normalized(&weights, shape.name)?;
                }
                (Solver::Multislerp { eps }, Unit::Tensor)
            }
            MethodPlan::Karcher { max_iter, tol } => (Solver::Karcher { max_iter, tol }, Unit::Tensor),
            MethodPlan::ModelStock { filter_wise, floor } => {
                (Solver::ModelStock { floor }, if filter_wise { Unit::Row(row) } else { Unit::Tensor })
            }
            _ => return Ok(None),
        };
        Ok(Some(Self {
            solver,
            weights,
            unit,
            elements: shape.elements,
            gathered: Mutex::default(),
            turn: Turn::default(),
            solved: OnceLock::new(),
        }))
    }

    fn coefficients(&self, products: Products<'_>, control: &Control) -> Result<Vec<f64>> {
        Ok(match self.solver {
            Solver::Slerp { t, parallel } => slerp(products, t, parallel),
            Solver::Multislerp { eps } => multislerp(products, &self.weights, eps),
            Solver::Karcher { max_iter, tol } => karcher(products, max_iter, tol, control)?,
            Solver::ModelStock { floor } => model_stock(products, floor),
        })
    }

    pub(super) fn shared_memory(&self) -> u64 {
        let n = self.weights.len() as u64;
        match self.unit {
            Unit::Tensor => self.elements.div_ceil(BLOCK) * (8 * pairs(n as usize) as u64 + 24),
            Unit::Row(row) => self.elements.div_ceil(row) * (8 * n),
            Unit::Column(columns) => columns * 8 * (pairs(n as usize) as u64 + n),
        }
    }

    pub(super) fn memory(&self) -> u64 {
        match self.unit {
            // Coefficients of the rows of a tile, until they are handed over.
            Unit::Row(row) => BLOCK.div_ceil(row) * 8 * self.weights.len() as u64,
            _ => 0,
        }
    }

    pub(super) fn give_up(&self) {
        self.turn.give_up();
    }

    /// Takes in a tile.
    pub(super) fn measure<W: Work>(
        &self,
        worker: Worker<'_>,
        job: &Job,
        tile: &Tile,
        lanes: &mut Lanes<W>,
    ) -> Result<()> {
        lanes.fit(self.weights.len());
        match self.unit {
            Unit::Tensor => self.measure_tensor(worker, job, tile, lanes),
            Unit::Row(row) => self.measure_rows(worker, job, tile, lanes, row),
            Unit::Column(columns) => self.measure_columns(worker, job, tile, lanes, columns),
        }
    }

    /// Reads every input of at most MICRO elements, and notes which of them are not all zero.
    fn read<W: Work>(
        worker: Worker<'_>,
        job: &Job,
        points: &mut Points<'_, '_, W>,
        lanes: &mut Lanes<W>,
        elements: &Range<u64>,
    ) -> Result<()> {
        let n = (elements.end - elements.start) as usize;
        let Lanes { inputs, base, moved, .. } = lanes;
        for (i, (input, moved)) in inputs.iter_mut().zip(moved).enumerate().take(points.readers.len()) {
            let largest = points.input_and_largest(i, &mut input[..n], &mut base[..n], elements)?;
            worker.check::<W>(job, W::from_magnitude(largest).is_finite(), elements)?;
            *moved |= largest != W::Magnitude::default();
        }
        Ok(())
    }

    /// Adds the products of at most MICRO elements, which are read in spans.
    fn add_dots<W: Work>(
        worker: Worker<'_>,
        job: &Job,
        points: &mut Points<'_, '_, W>,
        lanes: &mut Lanes<W>,
        elements: &Range<u64>,
        sums: &mut [f64],
    ) -> Result<()> {
        let inputs = points.readers.len();
        // Sums that hold are those of finite numbers that are not all zero.
        if inputs == 2
            && let Some(found) = points.products(elements)
            && found.iter().all(|&sum| sum.is_finite() && dispatch::holds::<W>(sum))
        {
            sums.iter_mut().zip(found).for_each(|(sum, found)| *sum += found);
            return Ok(());
        }
        let each = || (0..inputs).flat_map(|i| (i..inputs).map(move |j| (i, j)));
        lanes.sums.clear();
        lanes.sums.resize(pairs(inputs), [0.0; LANES]);
        lanes.moved.fill(false);
        for span in points.spans(elements) {
            Self::read(worker, job, points, lanes, &span)?;
            let n = (span.end - span.start) as usize;
            for ((i, j), sums) in each().zip(&mut lanes.sums) {
                dispatch::add_dots(worker.level, sums, &lanes.inputs[i][..n], &lanes.inputs[j][..n]);
            }
        }
        let holds = |(i, j): (usize, usize), sum: f64| {
            let moved = lanes.moved[i] && lanes.moved[j];
            !moved || dispatch::holds::<W>(sum)
        };
        if each().zip(&lanes.sums).all(|(pair, sums)| holds(pair, join(sums))) {
            sums.iter_mut().zip(&lanes.sums).for_each(|(sum, lanes)| *sum += join(lanes));
            return Ok(());
        }
        // Seldom: the same once more, with products in f64.
        let mut double = vec![[0.0; LANES]; lanes.sums.len()];
        for span in points.spans(elements) {
            Self::read(worker, job, points, lanes, &span)?;
            let n = (span.end - span.start) as usize;
            for ((i, j), double) in each().zip(&mut double) {
                dispatch::add_dots_double(worker.level, double, &lanes.inputs[i][..n], &lanes.inputs[j][..n]);
            }
        }
        let again = |found: f64, double| if dispatch::holds::<W>(found) { found } else { join(double) };
        for ((sum, lanes), double) in sums.iter_mut().zip(&lanes.sums).zip(&double) {
            *sum += again(join(lanes), double);
        }
        Ok(())
    }

    fn measure_tensor<W: Work>(&self, worker: Worker<'_>, job: &Job, tile: &Tile, lanes: &mut Lanes<W>) -> Result<()> {
        let inputs = self.weights.len();
        let mut opened = Opened::new(worker.level, job, &tile.elements, worker.pool)?;
        let mut points = opened.points();
        for (block, range) in tile.blocks() {
            let mut sums = vec![0.0; pairs(inputs)];
            for elements in micros(range) {
                Self::add_dots(worker, job, &mut points, lanes, &elements, &mut sums)?;
            }
            let mut gathered = self.gathered.lock().unwrap_or_else(PoisonError::into_inner);
            gathered.resize(self.elements.div_ceil(BLOCK) as usize, Vec::new());
            gathered[block as usize] = sums;
        }
        Ok(())
    }

    /// A row belongs to the tile in which it begins, which reads all of it.
    fn measure_rows<W: Work>(
        &self,
        worker: Worker<'_>,
        job: &Job,
        tile: &Tile,
        lanes: &mut Lanes<W>,
        row: u64,
    ) -> Result<()> {
        let inputs = self.weights.len();
        let rows = tile.elements.start.div_ceil(row)..tile.elements.end.div_ceil(row);
        let end = (rows.end * row).min(self.elements);
        let mut solved = Vec::with_capacity((rows.end - rows.start) as usize * inputs);
        let mut at = rows.start * row;
        let (mut of_row, mut of_block) = (vec![0.0; pairs(inputs)], vec![0.0; pairs(inputs)]);
        while at < end {
            let window = at..(at + BLOCK).min(end);
            let mut opened = Opened::new(worker.level, job, &window, worker.pool)?;
            let mut points = opened.points();
            while at < window.end {
                let within = at % row;
                // To the end of the row's own MICRO, which the next window goes on from if this one ends sooner.
                let stop = (at - within + (within / MICRO as u64 + 1) * MICRO as u64).min(at - within + row).min(end);
                if stop > window.end {
                    break;
                }
                Self::add_dots(worker, job, &mut points, lanes, &(at..stop), &mut of_block)?;
                at = stop;
                let ends = at.is_multiple_of(row) || at == end;
                if ends || (at % row).is_multiple_of(BLOCK) {
                    of_row.iter_mut().zip(&mut of_block).for_each(|(a, b)| *a += std::mem::take(b));
                }
                if ends {
                    solved.extend(self.coefficients(&square(inputs, |i| of_row[i]), worker.control)?);
                    of_row.fill(0.0);
                }
            }
        }
        let mut gathered = self.gathered.lock().unwrap_or_else(PoisonError::into_inner);
        if gathered.is_empty() {
            gathered.push(vec![0.0; self.elements.div_ceil(row) as usize * inputs]);
        }
        let from = rows.start as usize * inputs;
        gathered[0][from..from + solved.len()].copy_from_slice(&solved);
        Ok(())
    }

    fn measure_columns<W: Work>(
        &self,
        worker: Worker<'_>,
        job: &Job,
        tile: &Tile,
        lanes: &mut Lanes<W>,
        columns: u64,
    ) -> Result<()> {
        let inputs = self.weights.len();
        let mut opened = Opened::new(worker.level, job, &tile.elements, worker.pool)?;
        let mut points = opened.points();
        for (block, range) in tile.blocks() {
            self.turn.take(block as usize, worker.control, || {
                let mut sums = self.gathered.lock().unwrap_or_else(PoisonError::into_inner);
                sums.resize(pairs(inputs), vec![0.0; columns as usize]);
                for elements in micros(range.clone()) {
                    Self::read(worker, job, &mut points, lanes, &elements)?;
                    for (column, part) in runs(&elements, columns) {
                        let mut at = 0;
                        for i in 0..inputs {
                            for j in i..inputs {
                                let sums = &mut sums[at][column..column + part.len()];
                                let (a, b) = (&lanes.inputs[i][part.clone()], &lanes.inputs[j][part.clone()]);
                                dispatch::add_products_each(worker.level, sums, a, b);
                                at += 1;
                            }
                        }
                    }
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Coefficients from what was gathered.
    pub(super) fn solve(&self, control: &Control) -> Result<()> {
        let inputs = self.weights.len();
        let gathered = std::mem::take(&mut *self.gathered.lock().unwrap_or_else(PoisonError::into_inner));
        let solved = match self.unit {
            Unit::Tensor => {
                let mut sums = vec![0.0; pairs(inputs)];
                for block in &gathered {
                    sums.iter_mut().zip(block).for_each(|(a, b)| *a += b);
                }
                vec![self.coefficients(&square(inputs, |i| sums[i]), control)?]
            }
            Unit::Row(_) => gathered,
            Unit::Column(columns) => {
                let mut solved = vec![vec![0.0; columns as usize]; inputs];
                if !gathered.is_empty() {
                    for column in 0..columns as usize {
                        let found = self.coefficients(&square(inputs, |i| gathered[i][column]), control)?;
                        solved.iter_mut().zip(found).for_each(|(s, c)| s[column] = c);
                    }
                }
                solved
            }
        };
        self.solved.set(solved).map_err(|_| Error::Usage("coefficients were solved twice; please report this".into()))
    }

    /// What makes the tiles of the output.
    pub(super) fn update<'a, W: Work>(&'a self, lanes: &'a mut Lanes<W>) -> impl Update<W> + use<'a, W> {
        lanes.fit(1);
        Combine { gram: self, lanes, solved: self.solved.get().map_or(&[], Vec::as_slice) }
    }
}

struct Combine<'a, W> {
    gram: &'a Gram,
    lanes: &'a mut Lanes<W>,
    solved: &'a [Vec<f64>],
}

impl<W: Work> Update<W> for Combine<'_, W> {
    fn make(&mut self, points: &mut Points<'_, '_, W>, u: &mut [W], elements: Range<u64>) -> Result<bool> {
        let (level, inputs) = (points.level, self.gram.weights.len());
        let Lanes { base, inputs: values, .. } = &mut *self.lanes;
        let (base, value) = (&mut base[..u.len()], &mut values[0][..u.len()]);
        if self.gram.unit == Unit::Tensor
            && inputs == 2
            && points.blend(u, &elements, [0, 1].map(|i| W::from_f64(self.solved[0][i])))
        {
            return Ok(true);
        }
        for i in 0..inputs {
            if self.gram.unit == Unit::Tensor
                && points.add_plain(i, u, &elements, W::from_f64(self.solved[0][i]), i == 0)
            {
                continue;
            }
            points.input(i, value, base, &elements)?;
            match self.gram.unit {
                Unit::Tensor => dispatch::scaled_work(level, u, value, W::from_f64(self.solved[0][i]), i == 0),
                Unit::Row(row) => {
                    for (column, part) in runs(&elements, row) {
                        let number = (elements.start + part.start as u64 - column as u64) / row;
                        let c = W::from_f64(self.solved[0][number as usize * inputs + i]);
                        dispatch::scaled_work(level, &mut u[part.clone()], &value[part], c, i == 0);
                    }
                }
                Unit::Column(columns) => {
                    for (column, part) in runs(&elements, columns) {
                        let c = &self.solved[i][column..column + part.len()];
                        dispatch::scaled_each(level, &mut u[part.clone()], &value[part], c, i == 0);
                    }
                }
            }
        }
        Ok(true)
    }
}

/// The MICROs of a block.
pub(super) fn micros(block: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let (start, end) = (block.start, block.end);
    (start..end).step_by(MICRO).map(move |at| at..(at + MICRO as u64).min(end))
}

/// The parts of some elements that lie in one row each: the column of the first, and where they are among the elements.
pub(super) fn runs(elements: &Range<u64>, row: u64) -> impl Iterator<Item = (usize, Range<usize>)> + use<> {
    let Range { start, end } = *elements;
    let mut at = start;
    std::iter::from_fn(move || {
        (at < end).then(|| {
            let stop = ((at / row + 1) * row).min(end);
            let part = ((at % row) as usize, (at - start) as usize..(stop - start) as usize);
            at = stop;
            part
        })
    })
}

/// Of two vectors; square roots apart, so that their product does not overflow. A zero vector is at right angles to everything.
fn cosine(products: Products<'_>, i: usize, j: usize) -> f64 {
    floored_cosine(products, i, j, 0.0)
}

/// The same, the product of the norms taken as `floor` where it is less.
fn floored_cosine(products: Products<'_>, i: usize, j: usize, floor: f64) -> f64 {
    let scale = (products[i][i].sqrt() * products[j][j].sqrt()).max(floor);
    if scale == 0.0 { 0.0 } else { (products[i][j] / scale).clamp(-1.0, 1.0) }
}

/// `sin((1-t) q) / sin q` and `sin(t q) / sin q` for the angle `q` of the two; `1 - t` and `t` where they lie on a line, beyond the cosine
/// `parallel` (Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985).
fn slerp(products: Products<'_>, t: f64, parallel: f64) -> Vec<f64> {
    let cosine = cosine(products, 0, 1);
    if cosine.abs() > parallel {
        return vec![1.0 - t, t];
    }
    let q = cosine.acos();
    vec![((1.0 - t) * q).sin() / q.sin(), (t * q).sin() / q.sin()]
}

/// `t / n` for everyone, with `t = n c / (1 + (n - 1) c)` and `c` the mean cosine of the pairs (arXiv 2403.19522, equation 2).
fn model_stock(products: Products<'_>, floor: f64) -> Vec<f64> {
    let n = products.len();
    let (mut sum, mut count) = (0.0, 0.0);
    for i in 0..n {
        for j in i + 1..n {
            sum += floored_cosine(products, i, j, floor);
            count += 1.0;
        }
    }
    let c = if count > 0.0 { sum / count } else { 1.0 };
    let apart = 1.0 + (n as f64 - 1.0) * c;
    // Vectors that cancel each other leave the base as it is.
    let t = if apart > 1e-8 { n as f64 * c / apart } else { 0.0 };
    vec![t / n as f64; n]
}

/// The products of every vector with a combination.
fn times(products: Products<'_>, c: &[f64]) -> Vec<f64> {
    products.iter().map(|row| row.iter().zip(c).fold(0.0, |sum, (g, c)| sum + g * c)).collect()
}

fn length(products: Products<'_>, c: &[f64]) -> f64 {
    let squared = c.iter().zip(times(products, c)).fold(0.0, |sum, (c, p)| sum + c * p);
    // Not `max`, which would take a NaN for a zero.
    if squared < 0.0 { 0.0 } else { squared.sqrt() }
}

/// The products of the unit vectors.
fn directions(products: Products<'_>) -> Vec<Vec<f64>> {
    let n = products.len();
    let entry = |i, j| if i == j { 1.0 } else { cosine(products, i, j) };
    (0..n).map(|i| (0..n).map(|j| entry(i, j)).collect()).collect()
}

fn norms(products: Products<'_>) -> Vec<f64> {
    (0..products.len()).map(|i| products[i][i].sqrt()).collect()
}

/// The weighted mean of the unit vectors, to the length `sum(w_i |v_i|)`: the mean of points projected onto the tangent plane at `sum(w_i v_i / |v_i|)` is
/// the point of contact. The weights themselves where that sum is no longer than `eps`.
fn multislerp(products: Products<'_>, weights: &[f64], eps: f64) -> Vec<f64> {
    let norms = norms(products);
    let pull: Vec<f64> = weights.iter().zip(&norms).map(|(&w, &n)| if n == 0.0 { 0.0 } else { w }).collect();
    let length = length(&directions(products), &pull);
    if length <= eps {
        return weights.to_vec();
    }
    let scale = weights.iter().zip(&norms).fold(0.0, |sum, (w, n)| sum + w * n) / length;
    pull.iter().zip(&norms).map(|(w, &n)| if n == 0.0 { 0.0 } else { scale * w / n }).collect()
}

/// The Riemannian mean of the unit vectors, times the mean of their norms; every step is one of coefficients (Karcher, "Riemannian
/// center of mass and mollifier smoothing", 1977). Zero vectors take no part.
fn karcher(products: Products<'_>, max_iter: usize, tol: f64, control: &Control) -> Result<Vec<f64>> {
    let norms = norms(products);
    let count = norms.iter().filter(|&&n| n != 0.0).count() as f64;
    if count == 0.0 {
        return Ok(vec![0.0; norms.len()]);
    }
    let cosines = directions(products);
    let weights: Vec<f64> = norms.iter().map(|&n| if n == 0.0 { 0.0 } else { 1.0 / count }).collect();
    let size = length(&cosines, &weights);
    let first = norms.iter().position(|&n| n != 0.0);
    // Units that cancel each other have no direction that means anything.
    let mut mean: Vec<f64> = if size <= 1e-6 {
        (0..norms.len()).map(|i| if Some(i) == first { 1.0 } else { 0.0 }).collect()
    } else {
        weights.iter().map(|w| w / size).collect()
    };
    for _ in 0..max_iter {
        if control.cancelled() {
            return Err(Error::Cancelled);
        }
        let tangent = mean_logarithm(&cosines, &mean, &weights);
        let step = length(&cosines, &tangent);
        if step < tol {
            break;
        }
        let ahead = if step == 0.0 { 1.0 } else { step.sin() / step };
        let cosine = step.cos();
        let mut next: Vec<f64> = mean.iter().zip(&tangent).map(|(m, x)| cosine * m + ahead * x).collect();
        let size = length(&cosines, &next);
        next.iter_mut().for_each(|m| *m /= size);
        // From where it stays it will not go on: without a tolerance this is the only end but the last step.
        let stays = mean.iter().zip(&next).all(|(a, b)| a.to_bits() == b.to_bits());
        mean = next;
        if stays {
            break;
        }
    }
    let scale = norms.iter().fold(0.0, |sum, n| sum + n) / norms.len() as f64;
    Ok(mean.iter().zip(&norms).map(|(c, &n)| if n == 0.0 { 0.0 } else { scale * c / n }).collect())
}

/// The weighted sum of the logarithms of the unit vectors at the mean: each is `q / sin q (v_i - cos q m)`.
fn mean_logarithm(cosines: Products<'_>, mean: &[f64], weights: &[f64]) -> Vec<f64> {
    let mut tangent = vec![0.0; mean.len()];
    for (i, product) in times(cosines, mean).into_iter().enumerate() {
        let cosine = product.clamp(-1.0, 1.0);
        let q = cosine.acos();
        let sine = (1.0 - cosine * cosine).sqrt();
        let pull = weights[i] * if sine > 0.0 { q / sine } else { 1.0 };
        tangent[i] += pull;
        tangent.iter_mut().zip(mean).for_each(|(x, m)| *x -= pull * cosine * m);
    }
    tangent
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The products of `[2, 0]` and `[0, 1]`.
    fn right_angle() -> Vec<Vec<f64>> {
        vec![vec![4.0, 0.0], vec![0.0, 1.0]]
    }

    fn near(a: &[f64], b: &[f64]) -> bool {
        a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-12)
    }

    #[test]
    fn coefficients_of_a_right_angle() {
        let half = std::f64::consts::FRAC_1_SQRT_2;
        assert!(near(&slerp(&right_angle(), 0.5, 0.9995), &[half, half]));
        assert!(near(&multislerp(&right_angle(), &[0.5, 0.5], 1e-8), &[1.5 * half / 2.0, 1.5 * half]));
        let mean = karcher(&right_angle(), 10, 1e-5, &Control::default()).expect("not cancelled");
        assert!(near(&mean, &[1.5 * half / 2.0, 1.5 * half]));
        assert!(near(&model_stock(&right_angle(), 0.0), &[0.0, 0.0]));
    }

    /// Three unit vectors at these cosines, of other lengths.
    fn uneven() -> Vec<Vec<f64>> {
        vec![vec![1.0, 0.6, 0.9], vec![0.6, 4.0, 0.3], vec![0.9, 0.3, 9.0]]
    }

    #[test]
    fn the_mean_ends_where_it_stays() {
        // Without the ends, days.
        let control = Control::default();
        let ended = karcher(&right_angle(), usize::MAX, 0.0, &control).expect("not cancelled");
        assert_eq!(ended, karcher(&right_angle(), 1000, 0.0, &control).expect("not cancelled"));
        control.cancel();
        assert!(matches!(karcher(&uneven(), usize::MAX, 0.0, &control), Err(Error::Cancelled)));
    }

    #[test]
    fn vectors_on_a_line_are_interpolated_on_it() {
        let line = vec![vec![1.0, 2.0], vec![2.0, 4.0]];
        assert_eq!(slerp(&line, 0.25, 0.9995), [0.75, 0.25]);
        assert!(near(&model_stock(&line, 0.0), &[0.5, 0.5]));
        assert!(near(&model_stock(&line, 4.0), &[1.0 / 3.0, 1.0 / 3.0]));
    }

    #[test]
    fn rows_are_cut_at_their_ends() {
        let parts: Vec<_> = runs(&(5..23), 10).collect();
        assert_eq!(parts, [(5, 0..5), (0, 5..15), (0, 15..18)]);
    }
}
