//! The kernels at every level this processor has, in bytes of the file formats per second: what one core makes of a MICRO that lies in
//! its first-level cache, and of a block that comes from the second. `cargo bench --bench kernels --no-default-features -- bf16` runs some.

use std::hint::black_box;

use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime};
use reasonvec::bf16::{Bf16, Element};
use reasonvec::philox::Philox;
use reasonvec::simd::Level;
use reasonvec::simd::dispatch::{self, MICRO};
use reasonvec::store::Algorithm;
use reasonvec::stream::BLOCK;

/// Little-endian weights, the same in every run.
fn weights<E: Element>(n: usize, stream: u64) -> Vec<u8> {
    let generator = Philox::new(1, "weights", stream);
    let mut bytes = vec![0; n * E::SIZE];
    for (i, element) in bytes.chunks_exact_mut(E::SIZE).enumerate() {
        E::narrow64(generator.normal_pair(i as u64)[0] * 0.02).store(element);
    }
    bytes
}

/// A group whose figures are of so many elements.
fn group<'c, E: Element>(
    c: &'c mut Criterion,
    name: &str,
    format: &str,
    operands: usize,
) -> BenchmarkGroup<'c, WallTime> {
    let mut group = c.benchmark_group(format!("{name}/{format}"));
    group.throughput(Throughput::Bytes((MICRO * operands * E::SIZE) as u64));
    group.sample_size(20).warm_up_time(std::time::Duration::from_millis(200));
    group.measurement_time(std::time::Duration::from_millis(600));
    group
}

/// What `apply --from` does to every element: the difference, the sum, the rounding report.
fn combine<E: Element>(c: &mut Criterion, format: &str) {
    let [p, n, t] = [1, 2, 3].map(|stream| weights::<E>(MICRO, stream));
    let (mut u, r, mut out) = (vec![0f32; MICRO], vec![1e-4f32; MICRO], vec![0u8; MICRO * E::SIZE]);
    dispatch::difference::<E, f32>(Level::portable(), &mut u, &p, &n, 0.8, true);
    for level in Level::available() {
        let name = level.name();
        group::<E>(c, "difference", format, 2).bench_function(name, |b| {
            b.iter(|| dispatch::difference::<E, f32>(level, &mut u, black_box(&p), &n, 0.8, true))
        });
        group::<E>(c, "finish", format, 2)
            .bench_function(name, |b| b.iter(|| dispatch::finish::<E, f32>(level, &mut out, black_box(&t), &u)));
        group::<E>(c, "finish and report", format, 2).bench_function(name, |b| {
            b.iter(|| dispatch::finish_report::<E, f32>(level, &mut out, black_box(&t), &u));
        });
        group::<E>(c, "difference, finish and report", format, 4).bench_function(name, |b| {
            b.iter(|| dispatch::difference_report::<E, f32>(level, &mut out, black_box(&t), [&p, &n], 0.8));
        });
        group::<E>(c, "rounding", format, 1)
            .bench_function(name, |b| b.iter(|| dispatch::rounding(level, black_box(&u), &r)));
    }
}

/// What `extract` does where an eighth of the elements moved: which, their values, size and codes, and the proof that they lead back.
fn encode<E: Element>(c: &mut Criterion, format: &str) {
    let n = weights::<E>(MICRO, 1);
    let mut p = n.clone();
    for i in (0..MICRO).filter(|i| i.wrapping_mul(2_654_435_761) >> 7 & 7 == 0) {
        p[i * E::SIZE] ^= 1;
    }
    let (mut u, mut bits, mut picked) = (vec![0f32; MICRO], vec![0u8; MICRO / 8], vec![0f32; MICRO + 64]);
    dispatch::difference::<E, f32>(Level::portable(), &mut u, &p, &n, 1.0, true);
    let (mut codes, table) = (vec![0u8; MICRO / 8], Box::new([7u8; 1 << 16]));
    let mut into = [vec![[0; 2]; MICRO + 64], vec![[0; 2]; MICRO + 64]];
    for level in Level::available() {
        let name = level.name();
        group::<E>(c, "extent", format, 2)
            .bench_function(name, |b| b.iter(|| dispatch::extent(level, black_box(&u)).moved));
        group::<E>(c, "flag", format, 2)
            .bench_function(name, |b| b.iter(|| dispatch::flag(level, &mut bits, black_box(&u))));
        group::<E>(c, "pick", format, 2)
            .bench_function(name, |b| b.iter(|| dispatch::pick(level, &mut picked, &bits, black_box(&u))));
        if E::SIZE == 2 {
            let pair = || [p.as_chunks().0, n.as_chunks().0];
            group::<E>(c, "differing", format, 2).bench_function(name, |b| {
                b.iter(|| {
                    let [into_p, into_n] = &mut into;
                    dispatch::differing(level, &mut bits, [into_p, into_n], black_box(pair()))
                });
            });
        }
        group::<E>(c, "encode", format, 2).bench_function(name, |b| {
            b.iter(|| dispatch::encode(level, &mut codes, black_box(&picked[..MICRO / 8]), &table));
        });
        group::<E>(c, "rebuilds", format, 2)
            .bench_function(name, |b| b.iter(|| dispatch::rebuilds::<E, f32>(level, black_box(&p), &n, &u)));
    }
}

/// Norm-matched noise, which is bound by its logarithms.
fn noise(c: &mut Criterion) {
    let mut u = vec![0f32; MICRO];
    for level in Level::available() {
        let generator = Philox::new(1, "noise", 1);
        group::<f32>(c, "noise", "f32", 1).bench_function(level.name(), |b| {
            b.iter(|| dispatch::normal(level, black_box(&mut u), generator, 0, 0.02));
        });
    }
}

/// One block, as it is hashed in the pass.
fn digest(c: &mut Criterion) {
    let block = weights::<Bf16>(BLOCK as usize, 1);
    let mut group = c.benchmark_group("digest");
    group.throughput(Throughput::Bytes(block.len() as u64)).sample_size(20);
    for (name, algorithm) in [("xxh3-128", Algorithm::Xxh3), ("blake3", Algorithm::Blake3)] {
        group.bench_function(name, |b| b.iter(|| algorithm.hash(black_box(&block))));
    }
}

fn all(c: &mut Criterion) {
    combine::<Bf16>(c, "bf16");
    combine::<f32>(c, "f32");
    encode::<Bf16>(c, "bf16");
    noise(c);
    digest(c);
}

criterion_group!(kernels, all);
criterion_main!(kernels);
