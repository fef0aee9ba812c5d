//! The door: what Python sees. Plans come in as JSON, reports go out as JSON; handles and buffers are classes.

mod classes;
mod enter;
mod tensor;

use pyo3::prelude::*;

/// The compiled core of reasonvec. The public API is the Python package around it.
#[pymodule]
mod _reasonvec {
    use std::path::PathBuf;

    use pyo3::prelude::*;

    #[pymodule_export]
    use super::classes::{Checkpoint, VectorFolder};
    #[pymodule_export]
    use super::tensor::Tensor;

    use super::classes::{opened, parse};
    use super::enter::{enter, fail};
    use super::tensor::Storage;
    use crate::dtype::Dtype;
    use crate::linalg::Triplets;
    use crate::merge;
    use crate::plan::{Operands, Settings, TermPlan};
    use crate::simd::Level;
    use crate::store::{Algorithm, FileMap, Pool, TensorView, journal, writer};
    use crate::{Error, inspect, linalg, vector};

    /// The version of the compiled core.
    #[pyfunction]
    fn version() -> &'static str {
        env!("CARGO_PKG_VERSION")
    }

    /// Whether the core was compiled without optimisation, and is therefore slow.
    #[pyfunction]
    fn is_debug_build() -> bool {
        cfg!(debug_assertions)
    }

    /// The SIMD levels of this processor, the best last.
    #[pyfunction]
    fn simd_levels() -> Vec<&'static str> {
        Level::available().into_iter().map(Level::name).collect()
    }

    /// The SIMD level in use: the best, or what REASONVEC_SIMD asks for.
    #[pyfunction]
    fn simd_level(py: Python<'_>) -> PyResult<&'static str> {
        Level::current().map(Level::name).map_err(|e| fail(py, e))
    }

    /// What an apply plan will read, write and hold, from headers alone.
    #[pyfunction]
    #[pyo3(signature = (plan, operands: "Sequence[Checkpoint | VectorFolder]"))]
    fn predict(py: Python<'_>, plan: &str, operands: Vec<Py<PyAny>>) -> PyResult<String> {
        let plan: merge::ApplyPlan = parse(py, plan)?;
        let operands = opened(py, &operands)?;
        let prediction = merge::predict(&plan, Operands(&operands)).map_err(|e| fail(py, e))?;
        report(py, &prediction)
    }

    /// Writes the shards of an apply plan. `progress(done, total)` is called with bytes.
    #[pyfunction]
    #[pyo3(signature = (plan, operands: "Sequence[Checkpoint | VectorFolder]", progress: "Callable[[int, int], object] | None" = None))]
    fn apply(py: Python<'_>, plan: &str, operands: Vec<Py<PyAny>>, progress: Option<Py<PyAny>>) -> PyResult<String> {
        let plan: merge::ApplyPlan = parse(py, plan)?;
        let operands = opened(py, &operands)?;
        let done = enter(py, progress, |control| merge::apply(&plan, Operands(&operands), control))?;
        let rows: Vec<_> = done
            .iter()
            .map(|d| {
                let rounding = d.rounding().map(|r| {
                    serde_json::json!({
                        "intended": r.intended, "realised": r.realised, "dot": r.dot, "updated": r.updated, "lost": r.lost
                    })
                });
                serde_json::json!({
                    "name": d.name, "file": d.file, "digest": d.digest, "inputs": d.inputs, "rounding": rounding
                })
            })
            .collect();
        report(py, &rows)
    }

    /// Writes a vector folder from an extract plan; its manifest.
    #[pyfunction]
    #[pyo3(signature = (plan, operands: "Sequence[Checkpoint | VectorFolder]", progress: "Callable[[int, int], object] | None" = None))]
    fn extract(py: Python<'_>, plan: &str, operands: Vec<Py<PyAny>>, progress: Option<Py<PyAny>>) -> PyResult<String> {
        let plan: vector::extract::ExtractPlan = parse(py, plan)?;
        let operands = opened(py, &operands)?;
        let manifest = enter(py, progress, |control| vector::extract(&plan, Operands(&operands), control))?;
        report(py, &manifest)
    }

    /// Norms, products, counts and largest elements of quantities, in one pass.
    #[pyfunction]
    #[pyo3(signature = (plan, operands: "Sequence[Checkpoint | VectorFolder]", progress: "Callable[[int, int], object] | None" = None))]
    fn measure(py: Python<'_>, plan: &str, operands: Vec<Py<PyAny>>, progress: Option<Py<PyAny>>) -> PyResult<String> {
        let plan: inspect::MeasurePlan = parse(py, plan)?;
        let operands = opened(py, &operands)?;
        let rows = enter(py, progress, |control| inspect::measure(&plan, Operands(&operands), control))?;
        report(py, &rows)
    }

    /// Elements `start..stop` of a sum of terms, as F32, or as F64 if `double`.
    #[pyfunction]
    #[pyo3(signature = (terms, name, elements, start, stop, operands: "Sequence[Checkpoint | VectorFolder]", double=false))]
    #[allow(clippy::too_many_arguments, reason = "one call a chunk, not an object to keep")]
    fn values(
        py: Python<'_>,
        terms: &str,
        name: &str,
        elements: u64,
        start: u64,
        stop: u64,
        operands: Vec<Py<PyAny>>,
        double: bool,
    ) -> PyResult<Tensor> {
        let terms: Vec<TermPlan> = parse(py, terms)?;
        let operands = opened(py, &operands)?;
        let operands = Operands(&operands);
        let storage = enter(py, None, |control| {
            let range = start..stop;
            Ok(if double {
                Storage::Double(inspect::values(&terms, name, elements, range, operands, control)?)
            } else {
                Storage::Single(inspect::values(&terms, name, elements, range, operands, control)?)
            })
        })?;
        let dtype = if double { Dtype::F64 } else { Dtype::F32 };
        Ok(Tensor::new(storage, 0, dtype, vec![stop - start]))
    }

    /// What `values` leaves out of stored vectors: places from `start`, and F64 to add there.
    #[pyfunction]
    #[pyo3(signature = (terms, name, elements, start, stop, operands: "Sequence[Checkpoint | VectorFolder]"))]
    fn corrections(
        py: Python<'_>,
        terms: &str,
        name: &str,
        elements: u64,
        start: u64,
        stop: u64,
        operands: Vec<Py<PyAny>>,
    ) -> PyResult<Vec<(u64, f64)>> {
        let terms: Vec<TermPlan> = parse(py, terms)?;
        let operands = opened(py, &operands)?;
        enter(py, None, |_| inspect::corrections(&terms, name, elements, start..stop, Operands(&operands)))
    }

    /// Singular triplets of one matrix of a plan: U `[m, r]`, S `[r]` (F64), V^T `[r, n]`, the rest
    /// as JSON. U and V^T are F32, or F64 if `double`, which is for the smallest ones.
    #[pyfunction]
    #[pyo3(signature = (plan, operands: "Sequence[Checkpoint | VectorFolder]", progress: "Callable[[int, int], object] | None" = None, double=false))]
    fn svd(
        py: Python<'_>,
        plan: &str,
        operands: Vec<Py<PyAny>>,
        progress: Option<Py<PyAny>>,
        double: bool,
    ) -> PyResult<(Tensor, Tensor, Tensor, String)> {
        let plan: linalg::plan::SvdPlan = parse(py, plan)?;
        let operands = opened(py, &operands)?;
        let operands = Operands(&operands);
        if !double {
            let (matrix, found) = enter(py, progress, |control| linalg::plan::svd(&plan, operands, control))?;
            return triplets(py, matrix, found);
        }
        let ([rows, columns], found, turned) = enter(py, progress, |control| {
            let (shape, found) = linalg::plan::svd_exact(&plan, operands, control)?;
            let mut turned = vec![0.0f64; found.v.len()];
            linalg::dense::transpose(&found.v, &mut turned, shape[1], found.s.len());
            Ok((shape, found, turned))
        })?;
        let u = Storage::Double(found.u.clone());
        let Triplets { rank, s, squares, residual, floor, .. } = found.round();
        let rest = serde_json::json!({"rank": rank, "squares": squares, "residual": residual, "floor": floor});
        let r = rank as u64;
        Ok((
            Tensor::new(u, 0, Dtype::F64, vec![rows as u64, r]),
            Tensor::new(Storage::Double(s), 0, Dtype::F64, vec![r]),
            Tensor::new(Storage::Double(turned), 0, Dtype::F64, vec![r, columns as u64]),
            report(py, &rest)?,
        ))
    }

    /// Bytes of anonymous memory that `svd` takes at least and at most, of a shape and a rank.
    #[pyfunction]
    #[pyo3(signature = (plan))]
    fn svd_memory(py: Python<'_>, plan: &str) -> PyResult<(u64, u64)> {
        let [least, most] = linalg::plan::memory(&parse(py, plan)?);
        Ok((least, most))
    }

    /// Singular triplets, as `svd` gives them, of a product of thin factors: u is rows x k and v
    /// columns x k, both F32 as bytes. `rank` is that of an svd plan, but for the noise floor.
    #[pyfunction]
    #[pyo3(signature = (u, v, rows, columns, k, rank))]
    fn recompress(
        py: Python<'_>,
        u: &[u8],
        v: &[u8],
        rows: usize,
        columns: usize,
        k: usize,
        rank: &str,
    ) -> PyResult<(Tensor, Tensor, Tensor, String)> {
        let rank: linalg::Rank = parse(py, rank)?;
        let floats =
            |bytes: &[u8]| bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect::<Vec<f32>>();
        let (u, v) = (floats(u), floats(v));
        let found = enter(py, None, |_| linalg::thin::recompress(&u, &v, rows, columns, k, rank))?;
        triplets(py, [rows, columns], found)
    }

    /// Singular values of one matrix of a plan, its sum of squares and its noise floor, as JSON.
    #[pyfunction]
    #[pyo3(signature = (plan, operands: "Sequence[Checkpoint | VectorFolder]", progress: "Callable[[int, int], object] | None" = None))]
    fn spectrum(py: Python<'_>, plan: &str, operands: Vec<Py<PyAny>>, progress: Option<Py<PyAny>>) -> PyResult<String> {
        let plan: linalg::plan::SpectrumPlan = parse(py, plan)?;
        let operands = opened(py, &operands)?;
        let found = enter(py, progress, |control| linalg::plan::spectrum(&plan, Operands(&operands), control))?;
        report(py, &found)
    }

    /// Exact counts of the elements that differ between two checkpoints.
    #[pyfunction]
    #[pyo3(signature = (a, b, names: "Sequence[str]", settings, progress: "Callable[[int, int], object] | None" = None))]
    fn diff(
        py: Python<'_>,
        a: PyRef<'_, Checkpoint>,
        b: PyRef<'_, Checkpoint>,
        names: Vec<String>,
        settings: &str,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<String> {
        let settings: Settings = parse(py, settings)?;
        let (a, b) = (a.inner(), b.inner());
        let rows = enter(py, progress, |control| inspect::diff(&a, &b, &names, &settings, control))?;
        report(py, &rows)
    }

    /// The digests of some tensors of a checkpoint.
    #[pyfunction]
    #[pyo3(signature = (checkpoint, names: "Sequence[str]", algorithm, settings, progress: "Callable[[int, int], object] | None" = None))]
    fn digest_tensors(
        py: Python<'_>,
        checkpoint: PyRef<'_, Checkpoint>,
        names: Vec<String>,
        algorithm: &str,
        settings: &str,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Vec<Option<String>>> {
        let settings: Settings = parse(py, settings)?;
        let algorithm = parse_algorithm(py, algorithm)?;
        let checkpoint = checkpoint.inner();
        enter(py, progress, |control| {
            let views: Vec<TensorView> = names.iter().map(|n| checkpoint.tensor(n)).collect::<crate::Result<_>>()?;
            inspect::digests(&views.iter().collect::<Vec<_>>(), algorithm, &settings, control)
        })
    }

    /// The digest of any file, as if it were a tensor of bytes.
    #[pyfunction]
    #[pyo3(signature = (path, algorithm))]
    fn digest_file(py: Python<'_>, path: PathBuf, algorithm: &str) -> PyResult<Option<String>> {
        let algorithm = parse_algorithm(py, algorithm)?;
        enter(py, None, |_| {
            let map = std::sync::Arc::new(FileMap::open(&path)?);
            let whole = TensorView::at(&map, "", Dtype::U8, 0, map.len());
            algorithm.digest_tensor(&whole, &Pool::default())
        })
    }

    /// Checks every stored part of a vector folder against its manifest's digests.
    #[pyfunction]
    #[pyo3(signature = (vector, settings, progress: "Callable[[int, int], object] | None" = None))]
    fn verify_vector(
        py: Python<'_>,
        vector: PyRef<'_, VectorFolder>,
        settings: &str,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<()> {
        let settings: Settings = parse(py, settings)?;
        let vector = vector.inner();
        enter(py, progress, |control| inspect::verify_vector(&vector, &settings, control))
    }

    /// Writes a small file whole or not at all: beside its name, synced, renamed.
    #[pyfunction]
    #[pyo3(signature = (path, content, sync=true))]
    fn write_whole(py: Python<'_>, path: PathBuf, content: &[u8], sync: bool) -> PyResult<()> {
        writer::write_whole(&path, content, sync).map_err(|e| fail(py, e))
    }

    /// Copies a file whole or not at all, inside the kernel where it can.
    #[pyfunction]
    #[pyo3(signature = (source, destination, sync=true))]
    fn copy_whole(py: Python<'_>, source: PathBuf, destination: PathBuf, sync: bool) -> PyResult<()> {
        enter(py, None, |_| writer::copy_whole(&source, &destination, sync))
    }

    /// The name of the journal that an unfinished run leaves in its output folder.
    #[pyfunction]
    fn journal_name() -> &'static str {
        journal::NAME
    }

    fn triplets(
        py: Python<'_>,
        [rows, columns]: [usize; 2],
        found: Triplets,
    ) -> PyResult<(Tensor, Tensor, Tensor, String)> {
        let Triplets { rank, u, s, v, squares, residual, floor } = found;
        let mut turned = vec![0.0f32; v.len()];
        linalg::dense::transpose(&v, &mut turned, columns, rank);
        let rest = serde_json::json!({"rank": rank, "squares": squares, "residual": residual, "floor": floor});
        let r = rank as u64;
        Ok((
            Tensor::new(Storage::Single(u), 0, Dtype::F32, vec![rows as u64, r]),
            Tensor::new(Storage::Double(s), 0, Dtype::F64, vec![r]),
            Tensor::new(Storage::Single(turned), 0, Dtype::F32, vec![r, columns as u64]),
            report(py, &rest)?,
        ))
    }

    fn parse_algorithm(py: Python<'_>, name: &str) -> PyResult<Algorithm> {
        parse(py, &serde_json::Value::from(name).to_string())
    }

    fn report(py: Python<'_>, value: &impl serde::Serialize) -> PyResult<String> {
        serde_json::to_string(value).map_err(|e| fail(py, Error::Usage(e.to_string())))
    }
}
