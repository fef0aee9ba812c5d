//! `negative + vector == positive`, bit for bit, for every format and encoding; and a stored vector does what the difference does.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::{Dice, Family, Tensor, apply, difference, how, narrow, plan, stored, widen};
use proptest::prelude::*;
use reasonvec::dtype::Dtype;
use reasonvec::plan::{Operand, Operands, TermPlan};
use reasonvec::stream::{BLOCK, Control};
use reasonvec::vector::{Encoding, Row, VectorFolder};
use serde_json::json;

/// `negative + vector`, in the positive donor's formats.
fn rebuild(family: &Family, rows: &[Row]) -> BTreeMap<String, Vec<u8>> {
    let out = family.path("rebuilt");
    std::fs::create_dir_all(&out).unwrap();
    let tensor = |row: &Row| {
        let (target, term) = (common::at(1, &row.name), stored(1.0, 3, &row.name));
        json!({"name": row.name, "dtype": row.dtype, "shape": row.shape, "target": target, "terms": [term]})
    };
    let tensors: Vec<_> = rows.iter().map(tensor).collect();
    // What an F64 vector does not give back exactly may even fall off the end of its format.
    let what =
        json!({"out": out, "allow_nonfinite": true, "shards": [{"file": "model.safetensors", "tensors": tensors}]});
    apply(&plan(what, how(2, 16 << 20)), &family.operands).unwrap();
    common::contents(&out)
}

fn differing(dtype: Dtype, a: &[u8], b: &[u8]) -> Vec<usize> {
    assert_eq!(a.len(), b.len());
    a.chunks(dtype.size())
        .zip(b.chunks(dtype.size()))
        .enumerate()
        .filter(|(_, (a, b))| a != b)
        .map(|(i, _)| i)
        .collect()
}

/// The elements of a tensor that have a second part.
fn wide_positions(vector: &VectorFolder, row: &Row) -> BTreeSet<usize> {
    let Some(data) = &vector.data else { return BTreeSet::new() };
    let part = |role: &str| row.parts.get(role).map(|p| data.tensor(&p.entry).unwrap().read().unwrap());
    let (Some(at), Some(starts)) = (part("wide_at"), part("wide_starts")) else { return BTreeSet::new() };
    let starts: Vec<usize> = starts.chunks(8).map(|b| u64::from_le_bytes(b.try_into().unwrap()) as usize).collect();
    let at: Vec<usize> = at.chunks(4).map(|b| u32::from_le_bytes(b.try_into().unwrap()) as usize).collect();
    let block = |b: usize| at[starts[b]..starts[b + 1]].iter().map(move |p| b * BLOCK as usize + p);
    (0..starts.len() - 1).flat_map(block).collect()
}

/// The nearest pattern that is neither NaN nor infinite.
fn finite(dtype: Dtype, bits: u64) -> u64 {
    let bits = bits & (u64::MAX >> (64 - 8 * dtype.size()));
    let step = match dtype {
        Dtype::F64 => 1 << 52,
        Dtype::F32 => 1 << 23,
        Dtype::F16 => 1 << 10,
        _ => 1 << 7,
    };
    if widen(dtype, bits).is_finite() { bits } else { bits - step }
}

/// Donors whose difference is not a number are refused; here one of the pair is taken for both.
fn subtractable(p: (Dtype, u64), n: (Dtype, u64)) -> bool {
    let v = widen(p.0, p.1) - widen(n.0, n.1);
    if p.0 == Dtype::F64 || n.0 == Dtype::F64 { v.is_finite() } else { (v as f32).is_finite() }
}

/// How the positive donor's element comes about from the negative's.
#[derive(Debug, Clone, Copy)]
enum Move {
    Stays,
    Steps(i8),
    Flips,
    Becomes(u64),
}

fn moves() -> impl Strategy<Value = Move> {
    prop_oneof![
        2 => Just(Move::Stays),
        4 => (-3i8..=3).prop_map(Move::Steps),
        1 => Just(Move::Flips),
        3 => patterns().prop_map(Move::Becomes),
    ]
}

/// Bit patterns: any at all, zeros of both signs, subnormals, and ordinary weights.
fn patterns() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => any::<u64>(),
        1 => prop_oneof![Just(0), Just(u64::MAX << 63 | 1 << 31 | 1 << 15)],
        1 => any::<u64>().prop_map(|b| b & 0x8000_0000_8000_803F),
    ]
}

fn moved(p: Dtype, n: Dtype, bits: u64, how: Move) -> u64 {
    let same = narrow(p, widen(n, bits));
    let bits = match how {
        Move::Stays => same,
        Move::Steps(k) => same.wrapping_add_signed(i64::from(k)),
        Move::Flips => same ^ 1 << (8 * p.size() - 1),
        Move::Becomes(bits) => bits,
    };
    finite(p, bits)
}

/// Donors of some length that differ where the moves say, from an offset on, some elements apart.
fn donors(p: Dtype, n: Dtype, len: usize, stride: usize, list: &[(u64, Move)]) -> (Tensor, Tensor) {
    let mut dice = Dice::new(len as u64);
    let background: Vec<f64> = (0..len).map(|_| widen(Dtype::F16, narrow(Dtype::F16, dice.weight()))).collect();
    let mut negative = Tensor::floats("w", n, background);
    let mut positive = Tensor::floats("w", p, (0..len).map(|i| widen(n, negative.bit(i))));
    for (k, &(bits, how)) in list.iter().enumerate() {
        let at = k * stride % len;
        let bits = finite(n, bits);
        let new = moved(p, n, bits, how);
        if subtractable((p, new), (n, bits)) {
            negative.set(at, bits);
            positive.set(at, new);
        }
    }
    (positive, negative)
}

/// Lengths around the units in which kernels work, and any.
fn lengths() -> impl Strategy<Value = usize> {
    prop_oneof![1usize..300, 4090usize..4102, 1usize..9000]
}

const PAIRS: [(Dtype, Dtype); 9] = [
    (Dtype::BF16, Dtype::BF16),
    (Dtype::F16, Dtype::F16),
    (Dtype::F32, Dtype::F32),
    (Dtype::F64, Dtype::F64),
    (Dtype::BF16, Dtype::F32),
    (Dtype::F32, Dtype::BF16),
    (Dtype::F16, Dtype::BF16),
    (Dtype::BF16, Dtype::F64),
    (Dtype::F64, Dtype::F32),
];

proptest! {
    #[test]
    fn every_vector_gives_the_positive_donor_back(
        pair in prop::sample::select(&PAIRS[..]),
        choice in prop::sample::select(&["auto", "dense", "sparse"][..]),
        len in lengths(),
        stride in prop_oneof![Just(1usize), 2usize..200],
        list in prop::collection::vec((patterns(), moves()), 1..150),
    ) {
        let (p, n) = pair;
        let (positive, negative) = donors(p, n, len, stride, &list);
        let mut family = Family::one(&positive, &negative, &negative);
        let rows = family.extract(choice);
        let rebuilt = rebuild(&family, &rows);
        let wrong = differing(p, &rebuilt["w"], &positive.bytes);
        prop_assert_eq!(wrong.len() as u64, rows[0].inexact, "{:?} differ", wrong);
        if p != Dtype::F64 && n != Dtype::F64 {
            prop_assert_eq!(wrong, Vec::<usize>::new());
        }
    }

    #[test]
    fn a_stored_vector_does_what_the_difference_does(
        pair in prop::sample::select(&PAIRS[..]),
        target in prop::sample::select(&[Dtype::BF16, Dtype::F16, Dtype::F32, Dtype::F64][..]),
        choice in prop::sample::select(&["auto", "dense", "sparse"][..]),
        coefficient in prop_oneof![Just(1.0), -2.0..2.0],
        len in lengths(),
        stride in 1usize..200,
        list in prop::collection::vec((any::<u16>(), moves()), 1..150),
    ) {
        let (p, n) = pair;
        // Weights of ordinary size, so that no sum overflows whatever the coefficient.
        let tame: Vec<_> = list
            .iter()
            .map(|&(w, how)| {
                let bits = narrow(n, f64::from(w) / 65536.0 - 0.5);
                let large = widen(p, moved(p, n, bits, how)).abs() > 1.0;
                (bits, if large { Move::Becomes(narrow(p, -0.0078125)) } else { how })
            })
            .collect();
        let (positive, negative) = donors(p, n, len, stride, &tame);
        let mut dice = Dice::new(7);
        let t = Tensor::floats("w", target, (0..len).map(|_| dice.weight()));
        let mut family = Family::one(&positive, &negative, &t);
        let rows = family.extract(choice);
        let direct = family.apply("direct", 2, |name| vec![difference(coefficient, 0, 1, name)]);
        let through = family.apply("through", 2, |name| vec![stored(coefficient, 3, name)]);
        let Operand::Vector(v) = &family.operands[3] else { unreachable!() };
        let wide = wide_positions(v, &rows[0]);
        prop_assert_eq!(wide.len() as u64, rows[0].wide);
        let off: Vec<_> = differing(target, &direct["w"], &through["w"]).into_iter().filter(|i| !wide.contains(i)).collect();
        prop_assert_eq!(off, Vec::<usize>::new());
    }
}

/// Every finite pattern of a 16-bit format against every other one of some rotations.
fn all_patterns(dtype: Dtype) {
    let all: Vec<u64> = (0..=u64::from(u16::MAX)).filter(|&b| widen(dtype, b).is_finite()).collect();
    // One step, the other sign, and two that pair distant exponents.
    for turn in [1, all.len() / 2, 12_345, 40_961] {
        let negative = Tensor::bits("w", dtype, all.iter().copied());
        let partner = |i: usize| all[(i + turn) % all.len()];
        let positive = (0..all.len())
            .map(|i| if subtractable((dtype, partner(i)), (dtype, all[i])) { partner(i) } else { all[i] });
        let positive = Tensor::bits("w", dtype, positive);
        let mut family = Family::one(&positive, &negative, &negative);
        let rows = family.extract("auto");
        assert_eq!(rows[0].inexact, 0, "rotated by {turn}");
        assert!(rebuild(&family, &rows)["w"] == positive.bytes, "rotated by {turn}");
    }
}

#[test]
fn every_bf16_value_is_given_back() {
    all_patterns(Dtype::BF16);
}

#[test]
fn every_f16_value_is_given_back() {
    all_patterns(Dtype::F16);
}

#[test]
fn corrections_survive_the_borders_of_blocks() {
    let n = BLOCK as usize + 5000;
    let mut positive = Tensor::bits("w", Dtype::BF16, vec![0x3F80; n]);
    let mut negative = positive.clone();
    let mut dice = Dice::new(3);
    for border in [0, 4095, 4096, BLOCK as usize - 1, BLOCK as usize, BLOCK as usize + 4096, n - 1] {
        // It nearly vanishes: below the last place of the f32 difference.
        negative.set(border, 0x4E80);
        positive.set(border, 0x2E80 + dice.below(64));
    }
    for border in [1, BLOCK as usize - 2, BLOCK as usize + 1] {
        negative.set(border, 0x0000);
        positive.set(border, 0x8000);
    }
    for choice in ["dense", "sparse"] {
        let mut family = Family::one(&positive, &negative, &negative);
        let rows = family.extract(choice);
        assert_eq!((rows[0].wide, rows[0].inexact), (10, 0));
        assert!(rebuild(&family, &rows)["w"] == positive.bytes);
    }
}

struct Case {
    name: &'static str,
    dtype: Dtype,
    /// Positive and negative of an element.
    pair: fn(u64) -> (f64, f64),
    encoding: Encoding,
    /// The format of the values, and whether some of them are escapes.
    values: Option<(&'static str, bool)>,
}

fn bf16(bits: u64) -> f64 {
    widen(Dtype::BF16, bits)
}

/// One in eight moves, by one of six steps.
fn few(i: u64) -> (f64, f64) {
    (if i.is_multiple_of(8) { 1.0 + (i % 6 + 1) as f64 / 128.0 } else { 1.0 }, 1.0)
}

/// One in eight moves, to 750 different numbers of eight bits.
fn many(i: u64) -> (f64, f64) {
    (if i.is_multiple_of(8) { bf16(0x3C00 + i / 8) } else { 0.0 }, 0.0)
}

/// One in a thousand differs by more than eight bits can say.
fn now_and_then_long(i: u64, pair: fn(u64) -> (f64, f64)) -> (f64, f64) {
    if i % 1000 == 1 { (bf16(0x3B40 + i % 50), 1.0) } else { pair(i) }
}

/// With 24 bits, so that the f64 difference of two of them is exact: F64 donors have no second parts.
fn noise(i: u64) -> f64 {
    widen(Dtype::F32, narrow(Dtype::F32, Dice::new(i).weight()))
}

/// One tensor for every form that a stored tensor can take.
fn every_form() -> Vec<Case> {
    use Encoding::{Dense, Sparse, Zero};
    let case = |name, dtype, encoding, values, pair| Case { name, dtype, pair, encoding, values };
    vec![
        case("zero", Dtype::BF16, Zero, None, |_| (0.5, 0.5)),
        case("palette", Dtype::BF16, Sparse, Some(("U8", false)), few),
        case("palette-escapes", Dtype::BF16, Sparse, Some(("U8", true)), |i| now_and_then_long(i, few)),
        case("bf16", Dtype::BF16, Sparse, Some(("BF16", false)), many),
        case("bf16-escapes", Dtype::BF16, Sparse, Some(("BF16", true)), |i| now_and_then_long(i, many)),
        case("f32", Dtype::F32, Sparse, Some(("F32", false)), |i| {
            (if i.is_multiple_of(8) { noise(i) } else { 0.25 }, 0.25)
        }),
        case("f64", Dtype::F64, Sparse, Some(("F64", false)), |i| {
            (if i.is_multiple_of(8) { noise(i) } else { 0.25 }, 0.25)
        }),
        case("dense-bf16", Dtype::BF16, Dense, Some(("BF16", false)), |i| (bf16(i % 4096 + 1), 0.0)),
        case("dense-f32", Dtype::F32, Dense, Some(("F32", false)), |i| (noise(i), 0.25)),
        case("dense-f64", Dtype::F64, Dense, Some(("F64", false)), |i| (noise(i), 0.25)),
    ]
}

#[test]
fn every_form_is_taken_and_every_form_is_exact() {
    const N: u64 = 6000;
    let cases = every_form();
    let donor = |side: fn((f64, f64)) -> f64| -> Vec<Tensor> {
        cases.iter().map(|c| Tensor::floats(c.name, c.dtype, (0..N).map(|i| side((c.pair)(i))))).collect()
    };
    let (positive, negative) = (donor(|(p, _)| p), donor(|(_, n)| n));
    for choice in ["auto", "dense", "sparse"] {
        let mut family = Family::single(&positive, &negative, &negative);
        let rows = family.extract(choice);
        let file = std::fs::read(family.path("v").join("vector_model.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&file).unwrap();
        for (case, row) in cases.iter().zip(&rows) {
            assert_eq!(row.name, case.name);
            assert_eq!(row.inexact, 0, "{}", case.name);
            let expected = match (case.encoding, choice) {
                (Encoding::Zero, _) => Encoding::Zero,
                (_, "dense") => Encoding::Dense,
                (_, "sparse") => Encoding::Sparse,
                (auto, _) => auto,
            };
            assert_eq!(row.encoding, expected, "{}", case.name);
            if choice == "auto" {
                let values = row.parts.get("values").map(|p| format!("{:?}", file.tensor(&p.entry).unwrap().dtype()));
                let found = values.as_deref().map(|v| (v, row.parts.contains_key("escapes")));
                assert_eq!(found, case.values, "{}", case.name);
            }
        }
        let rebuilt = rebuild(&family, &rows);
        for tensor in &positive {
            assert!(rebuilt[&tensor.name] == tensor.bytes, "{} {choice}", tensor.name);
        }
        for tensor in &cases {
            let terms: Vec<TermPlan> = serde_json::from_value(json!([stored(1.0, 3, tensor.name)])).unwrap();
            let operands = Operands(&family.operands);
            let u: Vec<f32> =
                reasonvec::inspect::values(&terms, tensor.name, N, 0..N, operands, &Control::default()).unwrap();
            let expected: Vec<f32> = (0..N)
                .map(|i| {
                    let [p, n] =
                        [(tensor.pair)(i).0, (tensor.pair)(i).1].map(|x| widen(tensor.dtype, narrow(tensor.dtype, x)));
                    if tensor.dtype == Dtype::F64 { (p - n) as f32 } else { p as f32 - n as f32 }
                })
                .collect();
            assert_eq!(u, expected, "{} {choice}", tensor.name);
        }
    }
}

#[test]
fn a_vector_in_many_files_is_the_same_vector() {
    let cases = every_form();
    let donor = |side: fn((f64, f64)) -> f64| -> Vec<Tensor> {
        cases.iter().map(|c| Tensor::floats(c.name, c.dtype, (0..6000).map(|i| side((c.pair)(i))))).collect()
    };
    let (positive, negative) = (donor(|(p, _)| p), donor(|(_, n)| n));
    let mut family = Family::single(&positive, &negative, &negative);
    let whole = family.extract("auto");
    let mut small = common::extract_plan(&family.path("many"), family.checkpoint(0), "auto", how(2, 64 << 20));
    small.shard_bytes = 4000;
    let rows = common::extract(&small, &family.operands).unwrap();
    assert!(family.path("many").join("vector_model.safetensors.index.json").exists());
    assert_eq!(serde_json::to_value(&rows).unwrap(), serde_json::to_value(&whole).unwrap());
    assert_eq!(common::contents(&family.path("many")), common::contents(&family.path("v")));
    family.operands[3] = Operand::Vector(common::vector(&family.path("many")));
    let rebuilt = rebuild(&family, &rows);
    assert!(positive.iter().all(|t| rebuilt[&t.name] == t.bytes));
}

#[test]
fn tensors_without_elements_and_without_dimensions_pass() {
    let make = |x: f64| {
        vec![
            Tensor::floats("empty", Dtype::BF16, []).shaped(&[0, 4]),
            Tensor::floats("scalar", Dtype::F32, [x]).shaped(&[]),
            Tensor::floats("odd", Dtype::F16, [x; 3]).shaped(&[1, 3, 1]),
        ]
    };
    let mut family = Family::single(&make(0.75), &make(0.5), &make(2.0));
    let rows = family.extract("auto");
    assert_eq!(rows.iter().map(|r| r.moved).collect::<Vec<_>>(), [0, 1, 3]);
    let rebuilt = rebuild(&family, &rows);
    assert!(make(0.75).iter().all(|t| rebuilt[&t.name] == t.bytes));
    let applied = family.apply("applied", 2, |name| vec![stored(2.0, 3, name)]);
    assert!(make(2.5).iter().all(|t| applied[&t.name] == t.bytes));
}

#[test]
fn a_shuffled_vector_is_as_small_as_the_vector() {
    // Longer than a block, and few values, so that a palette is the smallest.
    let n = BLOCK + BLOCK / 3;
    let value =
        |i: u64, moved: bool| 1.0 + if moved && i.is_multiple_of(8) { 0.25 * (i / 8 % 5 + 1) as f64 } else { 0.0 };
    let tensor = |moved: bool| Tensor::floats("w", Dtype::BF16, (0..n).map(move |i| value(i, moved)));
    let mut family = Family::one(&tensor(true), &tensor(false), &tensor(false));
    let plain = family.extract("auto");
    let mut plan = common::extract_plan(&family.path("shuffled"), family.checkpoint(0), "auto", how(2, 64 << 20));
    plan.tensors[0].terms[0].control = Some(serde_json::from_value(json!({"kind": "shuffle", "seed": 3})).unwrap());
    let shuffled = common::extract(&plan, &family.operands).unwrap();
    assert_eq!(shuffled[0].moved, plain[0].moved);
    assert!(plain[0].parts.contains_key("palette"), "{:?}", plain[0].parts.keys());
    assert!(shuffled[0].parts.contains_key("palette"), "{:?}", shuffled[0].parts.keys());
    assert!(shuffled[0].bytes < plain[0].bytes + plain[0].bytes / 50, "{} and {}", shuffled[0].bytes, plain[0].bytes);
}
