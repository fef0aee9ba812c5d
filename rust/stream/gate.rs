//! Several stages over each tensor in one pass: which comes when, and who waits for whom.
//!
//! The stages of a tensor follow each other closely, so that its inputs are still in the page cache when they are read again; but not at
//! once, because a stage waits for the whole of the one before it, and workers should find it done.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

use super::pass::Control;
use crate::{Error, Result};

/// One stage of one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Visit {
    /// Which tensor.
    pub tensor: usize,
    /// Which of its stages.
    pub stage: usize,
}

/// Every stage of every tensor, lane by lane: a stage of the next tensor of a lane comes before the following stage of this one. Of each tensor,
/// how many stages it has, and its lane.
pub fn visits(tensors: &[(usize, usize)]) -> Vec<Visit> {
    let lanes = tensors.iter().map(|t| t.1 + 1).max().unwrap_or(0);
    (0..lanes).flat_map(|lane| in_lane(tensors, lane)).collect()
}

fn in_lane(tensors: &[(usize, usize)], lane: usize) -> Vec<Visit> {
    let stages: Vec<(usize, usize)> =
        tensors.iter().enumerate().filter(|(_, t)| t.1 == lane).map(|(i, t)| (i, t.0)).collect();
    let most = stages.iter().map(|t| t.1).max().unwrap_or(0);
    let mut order = Vec::with_capacity(stages.iter().map(|t| t.1).sum());
    for slot in 0..stages.len() + most {
        for stage in 0..most.min(slot + 1) {
            if let Some(&(tensor, _)) = stages.get(slot - stage).filter(|t| stage < t.1) {
                order.push(Visit { tensor, stage });
            }
        }
    }
    order
}

/// What keeps a stage from beginning before the one before it has ended.
#[derive(Debug)]
pub struct Gates {
    passed: Vec<AtomicUsize>,
    lock: Mutex<()>,
    moved: Condvar,
    broken: AtomicBool,
}

impl Gates {
    /// Gates for so many tensors.
    pub fn new(tensors: usize) -> Self {
        Self {
            passed: (0..tensors).map(|_| AtomicUsize::new(0)).collect(),
            lock: Mutex::default(),
            moved: Condvar::new(),
            broken: AtomicBool::new(false),
        }
    }

    /// Waits until every stage before this one has ended.
    ///
    /// # Errors
    /// [`Error::Cancelled`] when it will not end.
    pub fn wait(&self, visit: Visit, control: &Control) -> Result<()> {
        let open = || self.passed[visit.tensor].load(Ordering::Acquire) >= visit.stage;
        if open() {
            return Ok(());
        }
        let mut held = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        while !open() {
            if self.broken.load(Ordering::Relaxed) || control.cancelled() {
                return Err(Error::Cancelled);
            }
            // Not for ever: whoever has the last tile may have seen that the run was cancelled and gone.
            let wait = std::time::Duration::from_millis(50);
            held = self.moved.wait_timeout(held, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Says that a stage has ended.
    pub fn open(&self, visit: Visit) {
        self.passed[visit.tensor].store(visit.stage + 1, Ordering::Release);
        drop(self.lock.lock());
        self.moved.notify_all();
    }

    /// Wakes everyone who waits: a stage that they wait for will not end.
    pub fn give_up(&self) {
        self.broken.store(true, Ordering::Relaxed);
        drop(self.lock.lock());
        self.moved.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_comes_after_the_same_stage_of_the_next_tensor_of_its_lane() {
        let stages = [2, 1, 4, 2, 2];
        for lanes in 1..4 {
            let order = visits(&stages.iter().enumerate().map(|(i, &n)| (n, i % lanes)).collect::<Vec<_>>());
            assert_eq!(order.len(), stages.iter().sum::<usize>());
            let place = |tensor, stage| order.iter().position(|v| *v == Visit { tensor, stage }).unwrap();
            for (tensor, &n) in stages.iter().enumerate() {
                for stage in 1..n {
                    assert!(place(tensor, stage - 1) < place(tensor, stage));
                    if stages.get(tensor + lanes).is_some_and(|&next| stage - 1 < next) {
                        assert!(place(tensor + lanes, stage - 1) < place(tensor, stage));
                    }
                }
            }
        }
    }

    #[test]
    fn nobody_waits_for_a_stage_that_will_not_end() {
        let (gates, control) = (Gates::new(1), Control::default());
        std::thread::scope(|s| {
            let waiting = s.spawn(|| gates.wait(Visit { tensor: 0, stage: 1 }, &control));
            gates.give_up();
            assert!(matches!(waiting.join().unwrap(), Err(Error::Cancelled)));
        });
        gates.open(Visit { tensor: 0, stage: 0 });
        assert!(gates.wait(Visit { tensor: 0, stage: 1 }, &control).is_ok());
    }
}
