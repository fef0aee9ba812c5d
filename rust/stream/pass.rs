//! Workers over the tiles of a grid: start reading what comes soon, compute this tile, release it; progress, cancelling, errors.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

use super::tile::{Grid, Tile};
use crate::{Error, Result};

/// What the caller and the workers tell each other while a pass runs.
#[derive(Debug, Default)]
pub struct Control {
    stop: AtomicBool,
    done: AtomicU64,
    total: AtomicU64,
}

impl Control {
    /// Asks the workers to stop after the tile they are on.
    pub fn cancel(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Whether somebody asked.
    pub fn cancelled(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Says how many bytes the run will read and write.
    pub fn expect(&self, bytes: u64) {
        self.total.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Says that some of them are done.
    pub fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes done, and bytes expected.
    pub fn progress(&self) -> (u64, u64) {
        (self.done.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed))
    }
}

/// Tiles between the one that is worked on and the one that is asked for: a few MiB of every input, what keeps a disk busy.
const AHEAD: usize = 16;

/// Stops the others when a worker panics: somebody may wait for the tile that it was on.
struct Watch<'a>(&'a Control);

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.cancel();
        }
    }
}

/// Runs `work` on every tile, on up to `threads` threads, each with a scratch of its own; `ahead` is called for a tile that will be
/// taken soon.
///
/// # Errors
/// The error of the earliest tile that failed, whichever thread found it; [`Error::Cancelled`] if asked to stop.
///
/// # Panics
/// If a worker does, when all of them have stopped.
pub fn run<S>(
    grid: &Grid,
    threads: usize,
    control: &Control,
    scratch: impl Fn() -> S + Sync,
    ahead: impl Fn(&Tile) + Sync,
    work: impl Fn(&mut S, usize, &Tile) -> Result<()> + Sync,
) -> Result<()> {
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let first: Mutex<Option<(usize, Error)>> = Mutex::new(None);
    let worker = || {
        let _watch = Watch(control);
        if let Err(e) = subnormals_are_kept() {
            failed.store(true, Ordering::Relaxed);
            first.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert((0, e));
            return;
        }
        let mut scratch = scratch();
        // A tile that was handed out is worked on whatever happens to later ones, so that the earliest error is found in every race.
        while !failed.load(Ordering::Relaxed) && !control.cancelled() {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= grid.len() {
                return;
            }
            if i + AHEAD < grid.len() {
                ahead(&grid.tile(i + AHEAD));
            }
            if let Err(e) = work(&mut scratch, i, &grid.tile(i)) {
                failed.store(true, Ordering::Relaxed);
                let mut first = first.lock().unwrap_or_else(PoisonError::into_inner);
                // Those who were made to stop by somebody's failure have nothing to say about it.
                let rank = |i: usize, e: &Error| (matches!(e, Error::Cancelled), i);
                if first.as_ref().is_none_or(|(j, other)| rank(i, &e) < rank(*j, other)) {
                    *first = Some((i, e));
                }
                return;
            }
        }
    };
    std::thread::scope(|s| {
        for _ in 1..threads.min(grid.len()) {
            s.spawn(worker);
        }
        worker();
    });
    match first.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some((_, e)) => Err(e),
        None if control.cancelled() => Err(Error::Cancelled),
        None => Ok(()),
    }
}

/// Threads inherit the floating-point mode of their maker; `torch.set_flush_denormal(True)`, or a library built with -ffast-math, may have changed it.
fn subnormals_are_kept() -> Result<()> {
    let half = std::hint::black_box(f32::MIN_POSITIVE) * std::hint::black_box(0.5);
    if half > 0.0 && half * 2.0 == f32::MIN_POSITIVE {
        return Ok(());
    }
    Err(Error::Usage(
        "this process flushes subnormal numbers to zero, which would change results; call torch.set_flush_denormal(False) first".into(),
    ))
}

/// Lets workers through in the order of their tiles.
#[derive(Debug, Default)]
pub struct Turn {
    next: Mutex<usize>,
    moved: Condvar,
    broken: AtomicBool,
}

impl Turn {
    /// Waits until every earlier number has passed, runs `work`, and lets the next number through.
    ///
    /// # Errors
    /// What `work` fails with; [`Error::Cancelled`] when an earlier turn failed.
    pub fn take<R>(&self, number: usize, control: &Control, work: impl FnOnce() -> Result<R>) -> Result<R> {
        let stopped = || self.broken.load(Ordering::Relaxed) || control.cancelled();
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        while *next != number && !stopped() {
            // Not for ever: whoever has the turn before this one may have seen that the run was cancelled and gone.
            let wait = std::time::Duration::from_millis(50);
            next = self.moved.wait_timeout(next, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
        if stopped() {
            return Err(Error::Cancelled);
        }
        let result = work();
        if result.is_err() {
            self.broken.store(true, Ordering::Relaxed);
        }
        *next += 1;
        drop(next);
        self.moved.notify_all();
        result
    }

    /// Wakes everyone who waits: a turn that they wait for will not come.
    pub fn give_up(&self) {
        self.broken.store(true, Ordering::Relaxed);
        drop(self.next.lock());
        self.moved.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;
    use crate::select::Order;
    use crate::stream::{BLOCK, Gates, Line, Visit};

    /// Whether a run ends, by the panic of the worker of tile 1, while the others `wait`.
    fn ends(threads: usize, wait: impl Fn(usize, &Control) -> Result<()> + Sync) -> bool {
        let (control, grid) = (Control::default(), Grid::new(vec![6 * BLOCK], 1));
        let work = |_: &mut (), i: usize, _: &Tile| {
            assert!(i != 1, "tile 1");
            wait(i, &control)
        };
        let ran = catch_unwind(AssertUnwindSafe(|| run(&grid, threads, &control, || (), |_| {}, work)));
        ran.is_err() && control.cancelled()
    }

    #[test]
    fn a_worker_that_panics_ends_the_run() {
        for threads in [1, 2, 4] {
            let turn = Turn::default();
            assert!(ends(threads, |i, control| turn.take(i, control, || Ok(()))));
            for room in [0, 1, threads] {
                let line = Line::new(room);
                assert!(ends(threads, |i, control| line.join(i, (), control, |()| Ok(()))));
            }
            let gates = Gates::new(1);
            assert!(ends(threads, |i, control| gates.wait(Visit { tensor: 0, stage: i }, control)));
            let order = Order::new(1);
            assert!(ends(threads, |i, control| order.pass(i as u64, &[0], &[1], control).map(|_| ())));
        }
    }

    #[test]
    fn a_turn_that_panics_ends_the_run() {
        let turn = Turn::default();
        let (control, grid) = (Control::default(), Grid::new(vec![6 * BLOCK], 1));
        let work = |_: &mut (), i: usize, _: &Tile| {
            turn.take(i, &control, || {
                assert!(i != 1, "turn 1");
                Ok(())
            })
        };
        assert!(catch_unwind(AssertUnwindSafe(|| run(&grid, 3, &control, || (), |_| {}, work))).is_err());
    }
}
