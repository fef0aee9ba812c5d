//! Methods that look at their models before they combine them: against a naive version of a few, one digest for all however they are run,
//! and refusals before anything is written.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::{Dice, Tensor, apply, at, checkpoint, contents, how, narrow, plan, widen, write_checkpoint};
use reasonvec::Error;
use reasonvec::dtype::Dtype;
use reasonvec::merge::{self, ApplyPlan};
use reasonvec::plan::{Operand, Operands};
use reasonvec::select::places;
use reasonvec::stream::{BLOCK, Control};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const WEIGHTS: [f64; 3] = [0.5, 0.3, 0.7];

/// Every method: its plan, whether it has a base, and how many models it merges.
fn methods() -> Vec<(Value, bool, usize)> {
    let density = json!([0.2, 0.5, 0.7]);
    vec![
        (json!({"kind": "slerp", "t": 0.3}), false, 2),
        (json!({"kind": "nuslerp"}), true, 2),
        (json!({"kind": "nuslerp", "flatten": false}), false, 2),
        (json!({"kind": "nuslerp", "flatten": false, "row_wise": true}), true, 2),
        (json!({"kind": "multislerp"}), true, 3),
        (json!({"kind": "karcher"}), false, 3),
        (json!({"kind": "model_stock"}), true, 3),
        (json!({"kind": "model_stock", "filter_wise": true}), true, 3),
        (json!({"kind": "ties", "density": density}), true, 3),
        (json!({"kind": "dare", "density": density, "seed": 7}), true, 3),
        (json!({"kind": "dare", "density": density, "seed": 7, "rescale": "l1", "consensus": true}), true, 3),
        (json!({"kind": "della", "density": density, "epsilon": [0.1, 0.1, 0.2], "seed": 7}), true, 3),
        (json!({"kind": "della", "density": density, "epsilon": [0.1, 0.1, 0.2], "rescale": "l1"}), true, 3),
        (json!({"kind": "breadcrumbs", "density": density, "gamma": [0.01, 0.1, 0.2]}), true, 3),
        (json!({"kind": "sce", "select_topk": 0.4}), true, 3),
        (json!({"kind": "dare", "density": [0.0, 0.5, 1.0], "seed": 7}), true, 3),
        (json!({"kind": "sce"}), true, 3),
        (json!({"kind": "ram"}), true, 3),
        (json!({"kind": "ram", "plus": true}), true, 3),
        (json!({"kind": "nearswap", "t": 0.001}), false, 2),
        (json!({"kind": "arcee_fusion"}), true, 1),
    ]
}

/// A base (0) or one of its models: two blocks, the second a short one, rows that straddle blocks, and many equal differences.
fn member(model: u64) -> Vec<Tensor> {
    let mut tensors = Vec::new();
    for (name, dtype, shape) in [
        ("matrix", Dtype::BF16, vec![300, 901]),
        ("steps", Dtype::F32, vec![2, 131_101]),
        ("half", Dtype::F16, vec![3, 7, 19]),
        ("double", Dtype::F64, vec![131, 70]),
        ("norm", Dtype::F32, vec![513]),
        ("scalar", Dtype::F32, vec![]),
        ("empty", Dtype::BF16, vec![0, 8]),
    ] {
        let n: u64 = shape.iter().product();
        let (mut base, mut own) = (Dice::new(name.len() as u64), Dice::new(model * 31 + 1));
        let values: Vec<f64> = (0..n)
            .map(|_| {
                let (x, step) = (base.weight(), own.below(17) as f64 - 8.0);
                if name == "steps" {
                    // Exact steps: most differences have an equal.
                    (x * 4096.0).round() / 4096.0 + if model == 0 { 0.0 } else { step / 4096.0 }
                } else if model == 0 {
                    x
                } else {
                    x + 0.1 * own.weight()
                }
            })
            .collect();
        tensors.push(Tensor::floats(name, dtype, values).shaped(&shape));
    }
    tensors
}

struct Models {
    folder: tempfile::TempDir,
    operands: Vec<Operand>,
    tensors: Vec<Vec<Tensor>>,
}

impl Models {
    fn new(tensors: Vec<Vec<Tensor>>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let open = |(i, tensors): (usize, &Vec<Tensor>)| {
            let path = folder.path().join(i.to_string());
            write_checkpoint(&path, std::slice::from_ref(tensors));
            Operand::Checkpoint(checkpoint(&path))
        };
        let operands = tensors.iter().enumerate().map(open).collect();
        Self { folder, operands, tensors }
    }

    fn plan(&self, out: &Path, method: &Value, base: bool, models: usize, how: Value) -> ApplyPlan {
        let tensor = |t: &Tensor| {
            let term = |i: usize| json!({"coefficient": WEIGHTS[i], "source": {"tensor": at(i + 1, &t.name)}});
            json!({
                "name": t.name, "dtype": t.dtype.name(), "shape": t.shape, "method": method,
                "target": base.then(|| at(0, &t.name)), "terms": (0..models).map(term).collect::<Vec<_>>(),
            })
        };
        let tensors: Vec<Value> = self.tensors[0].iter().map(tensor).collect();
        std::fs::create_dir_all(out).unwrap();
        plan(json!({"out": out, "shards": [{"file": "model.safetensors", "tensors": tensors}]}), how)
    }

    fn merge(&self, method: &Value, base: bool, models: usize, how: Value) -> BTreeMap<String, Vec<u8>> {
        let out = self.folder.path().join("out");
        apply(&self.plan(&out, method, base, models, how), &self.operands).unwrap();
        let found = contents(&out);
        std::fs::remove_dir_all(&out).unwrap();
        found
    }

    fn values(&self, model: usize, name: &str) -> Vec<f32> {
        let t = self.tensors[model].iter().find(|t| t.name == name).unwrap();
        (0..t.len()).map(|i| widen(t.dtype, t.bit(i)) as f32).collect()
    }
}

fn family() -> Models {
    Models::new((0..4).map(member).collect())
}

#[test]
fn every_method_gives_one_output_however_it_is_run() {
    let models = family();
    for (method, base, n) in methods() {
        let expected = models.merge(&method, base, n, how(1, 64 * MIB));
        assert_eq!(expected.len(), models.tensors[0].len());
        for (threads, budget) in [(2, 64 * MIB), (3, 1024 * MIB), (8, 16 * MIB), (2, 1)] {
            let found = models.merge(&method, base, n, how(threads, budget));
            assert!(found == expected, "{method} depends on {threads} threads, {budget} bytes");
        }
    }
}

#[test]
fn a_prediction_stays_within_the_budget() {
    let models = family();
    let out = models.folder.path().join("predicted");
    for (method, base, n) in methods() {
        let plan = models.plan(&out, &method, base, n, how(2, 64 * MIB));
        let predicted = merge::predict(&plan, Operands(&models.operands)).unwrap();
        assert!(predicted.memory <= 64 * MIB && predicted.threads == 2, "{method}: {predicted:?}");
    }
}

/// The `k` largest, the lowest index first among equals, by sorting.
fn largest(d: &[f32], k: usize) -> Vec<bool> {
    let mut order: Vec<usize> = (0..d.len()).collect();
    order.sort_by(|&a, &b| d[b].abs().total_cmp(&d[a].abs()));
    let mut kept = vec![false; d.len()];
    order[..k].iter().for_each(|&i| kept[i] = true);
    kept
}

#[test]
fn ties_is_what_sorting_gives() {
    let models = family();
    let density = [0.2, 0.5, 0.7];
    for normalize in [true, false] {
        let method = json!({"kind": "ties", "density": density, "normalize": normalize, "lambda": 0.9});
        let found = models.merge(&method, true, 3, how(2, 64 * MIB));
        for t in models.tensors[0].iter().filter(|t| t.dtype != Dtype::F64) {
            let base = models.values(0, &t.name);
            let mut parts: Vec<Vec<f32>> = Vec::new();
            for i in 0..3 {
                let x = models.values(i + 1, &t.name);
                let d: Vec<f32> = x.iter().zip(&base).map(|(x, b)| x - b).collect();
                let kept = largest(&d, (density[i] * d.len() as f64) as usize);
                let c = WEIGHTS[i] as f32;
                parts.push(d.iter().zip(kept).map(|(d, kept)| if kept { c * d } else { 0.0 }).collect());
            }
            for j in 0..base.len() {
                let total: f32 = parts.iter().fold(0.0, |sum, p| sum + p[j]);
                let (mut sum, mut share) = (0.0f32, 0.0f32);
                for (part, w) in parts.iter().zip(WEIGHTS) {
                    if if total >= 0.0 { part[j] > 0.0 } else { part[j] < 0.0 } {
                        sum += part[j];
                        share += w as f32;
                    }
                }
                let divisor = if normalize && share.abs() >= 1e-8 { share } else { 1.0 };
                let u = 0.9f32 * (sum / divisor);
                let expected = if u == 0.0 { t.bit(j) } else { narrow(t.dtype, f64::from(base[j] + u)) };
                assert_eq!(common::element(t.dtype, &found[&t.name], j), expected, "{} at {j}", t.name);
            }
        }
    }
}

#[test]
fn of_equals_those_with_the_lowest_index_are_kept() {
    let n = 2 * BLOCK + 1000;
    let flat = |x: f64| vec![Tensor::floats("w", Dtype::F32, vec![x; n as usize])];
    let models = Models::new(vec![flat(1.0), flat(1.5), flat(1.25)]);
    for share in [0.0, 0.3, 0.75, 0.9999, 1.0] {
        let method = json!({"kind": "ties", "density": [share, 1.0]});
        let found = models.merge(&method, true, 2, how(2, 64 * MIB));
        let kept = (share * n as f64) as u64;
        for i in 0..n {
            let (w, v) = (WEIGHTS[0] as f32, WEIGHTS[1] as f32);
            let u = if i < kept { (w * 0.5 + v * 0.25) / (w + v) } else { (v * 0.25) / v };
            let expected = u64::from((1.0 + u).to_bits());
            assert_eq!(common::element(Dtype::F32, &found["w"], i as usize), expected, "element {i}");
        }
    }
}

/// A tensor of which the sample, or its beginning, shows something else than there is: it is merged with a base of zeros.
fn misleading(kind: &str, n: u64) -> Vec<f64> {
    let mut dice = Dice::new(n);
    let mut values: Vec<f64> = (0..n)
        .map(|i| match kind {
            // The equals of the threshold are all in the first half.
            "uneven" if i < n / 2 => [1.0, 1.0, 2.0][dice.below(3) as usize],
            "uneven" => 0.5,
            _ => dice.below(1000) as f64 / 1000.0 - 0.5,
        })
        .collect();
    if kind == "hidden" {
        for place in places(n) {
            values[place.start as usize..place.end as usize].fill(0.125);
        }
    }
    values
}

#[test]
fn what_a_sample_makes_one_expect_changes_nothing() {
    let n = 5 * BLOCK - 777;
    for kind in ["plain", "uneven", "hidden"] {
        let d = misleading(kind, n);
        let tensor = |values| vec![Tensor::floats("w", Dtype::F32, values)];
        let models = Models::new(vec![tensor(vec![0.0; n as usize]), tensor(d.clone())]);
        let d: Vec<f32> = d.into_iter().map(|x| x as f32).collect();
        for (density, gamma) in [(0.2, None), (0.6, None), (0.3, Some(0.1))] {
            let (mut method, k) = (json!({"kind": "ties", "density": [density]}), (density * n as f64) as usize);
            let mut most = 0;
            if let Some(gamma) = gamma {
                method = json!({"kind": "breadcrumbs", "density": [density], "gamma": [gamma], "normalize": true});
                most = (gamma * n as f64) as usize;
            }
            let (kept, dropped) = (largest(&d, k + most), largest(&d, most));
            for threads in [1, 3] {
                let found = models.merge(&method, true, 1, how(threads, 64 * MIB));
                for (i, &x) in d.iter().enumerate() {
                    let expected = if kept[i] && !dropped[i] { (0.5 * x) / 0.5 } else { 0.0 };
                    let bits = common::element(Dtype::F32, &found["w"], i);
                    assert_eq!(bits, u64::from((0.0 + expected).to_bits()), "{kind} {method}: element {i}");
                }
            }
        }
    }
}

#[test]
fn what_would_not_fit_if_the_sample_were_right_is_no_error() {
    let n = 4 * BLOCK;
    let sampled: Vec<bool> = {
        let mut sampled = vec![false; n as usize];
        places(n).into_iter().for_each(|p| sampled[p.start as usize..p.end as usize].fill(true));
        sampled
    };
    // From the first block on, and from the second of those that are written together.
    for start in [0, BLOCK] {
        // Of every ten elements three move far, from zero; two a little, but from where F16 has no room for twice of it.
        let pair = |i: u64| match i % 10 {
            _ if sampled[i as usize] || i < start => (0.0, 16.0),
            0..3 => (0.0, 30_000.0),
            3..5 => (60_000.0, 64_000.0),
            _ => (0.0, 16.0),
        };
        let (base, own): (Vec<f64>, Vec<f64>) = (0..n).map(pair).unzip();
        let far = (0..n).filter(|&i| pair(i).1 == 30_000.0).count() as f64;
        let tensor = |values| vec![Tensor::floats("w", Dtype::F16, values)];
        let models = Models::new(vec![tensor(base), tensor(own)]);
        let method = json!({"kind": "ties", "density": [(far + 0.5) / n as f64], "lambda": 2.0});
        let found = models.merge(&method, true, 1, how(2, 64 * MIB));
        for i in 0..n {
            let expected = if pair(i).1 == 30_000.0 { 60_000.0 } else { pair(i).0 };
            let bits = common::element(Dtype::F16, &found["w"], i as usize);
            assert_eq!(bits, narrow(Dtype::F16, expected), "element {i}");
        }
    }
}

#[test]
fn slerp_keeps_to_the_sphere() {
    let models = family();
    let found = models.merge(&json!({"kind": "slerp", "t": 0.3}), false, 2, how(2, 64 * MIB));
    let (a, b) = (models.values(1, "steps"), models.values(2, "steps"));
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
    let q = (dot(&a, &b) / (dot(&a, &a) * dot(&b, &b)).sqrt()).acos();
    for i in 0..a.len() {
        let expected = ((0.7 * q).sin() * f64::from(a[i]) + (0.3 * q).sin() * f64::from(b[i])) / q.sin();
        let value = widen(Dtype::F32, common::element(Dtype::F32, &found["steps"], i));
        assert!((value - expected).abs() < 1e-6, "element {i}: {value}, expected {expected}");
    }
}

#[test]
fn what_does_not_fit_the_output_is_told_with_a_file() {
    let models = Models::new([0.0, 1e10, 2e10].map(|x| vec![Tensor::floats("w", Dtype::F32, [x, 1.0])]).to_vec());
    let out = models.folder.path().join("out");
    let plan = models.plan(&out, &json!({"kind": "slerp", "t": 1e30}), false, 2, how(1, MIB));
    let text = apply(&plan, &models.operands).unwrap_err().to_string();
    assert!(text.contains("model.safetensors: tensor w: element 0 is "), "{text}");
}

#[test]
fn a_method_that_cannot_be_carried_out_is_refused_before_anything_is_written() {
    let models = family();
    let ties = |density: Value| json!({"kind": "ties", "density": density});
    let cases = [
        (json!({"kind": "slerp", "t": 0.5}), false, 3, "slerp merges 2 models, the plan has 3"),
        (json!({"kind": "slerp", "t": 0.5}), true, 2, "slerp has no base model, the plan gives one"),
        (ties(json!([0.5, 0.5])), false, 2, "ties needs a base model, the plan has none"),
        (ties(json!([0.5])), true, 2, "ties has 1 numbers for density, but 2 models"),
        (ties(json!([0.5, 1.5])), true, 2, "density is 1.5, it is a share from 0 to 1"),
        (json!({"kind": "sce", "select_topk": -0.1}), true, 2, "select_topk is -0.1"),
        (json!({"kind": "dare", "density": [-0.5, 1.0]}), true, 2, "density is -0.5"),
        (json!({"kind": "nearswap", "t": -1.0}), false, 2, "t is -1"),
    ];
    for (method, base, n, words) in cases {
        let out = models.folder.path().join("refused");
        let plan = models.plan(&out, &method, base, n, how(1, MIB));
        let error = apply(&plan, &models.operands).unwrap_err();
        assert!(matches!(error, Error::Mismatch { .. }) && error.to_string().contains(words), "{method}: {error}");
        assert_eq!(std::fs::read_dir(&out).unwrap().count(), 0);
    }
    for method in [
        json!({"kind": "ties", "density": [1.0], "densty": 3}),
        json!({"kind": "tise"}),
        json!({"kind": "arcee_fusion", "t": 1}),
    ] {
        assert!(serde_json::from_value::<merge::MethodPlan>(method).is_err());
    }
}

#[test]
fn a_nan_that_a_mask_would_drop_is_an_error_all_the_same() {
    let mut tensors: Vec<Vec<Tensor>> = (0..4).map(member).collect();
    let place = tensors[2].iter().position(|t| t.name == "matrix").unwrap();
    tensors[2][place].set(270_000, 0x7FC0);
    let models = Models::new(tensors);
    for (method, base, n) in methods() {
        // The third of the operands is the second of the models.
        if n < 2 {
            continue;
        }
        let out = models.folder.path().join("nan");
        let error = apply(&models.plan(&out, &method, base, n, how(2, 64 * MIB)), &models.operands).unwrap_err();
        assert!(matches!(&error, Error::NonFinite { index: 270_000, .. }), "{method}: {error}");
        std::fs::remove_dir_all(&out).unwrap();
    }
}

#[test]
fn a_cancelled_run_ends() {
    let models = family();
    for (method, base, n) in methods() {
        let control = Control::default();
        control.cancel();
        let plan = models.plan(&models.folder.path().join("cancelled"), &method, base, n, how(3, 64 * MIB));
        assert!(matches!(merge::apply(&plan, Operands(&models.operands), &control), Err(Error::Cancelled)));
    }
}
