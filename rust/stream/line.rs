//! Results that are taken in order, whichever comes first.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::Control;
use crate::{Error, Result};

/// What workers bring, in the order of their tiles. What comes early waits in line, and its worker goes on: who brings the next in order takes
/// care of those behind it as well.
#[derive(Debug)]
pub struct Line<T> {
    room: usize,
    state: Mutex<State<T>>,
    moved: Condvar,
    broken: AtomicBool,
}

#[derive(Debug)]
struct State<T> {
    next: usize,
    early: BTreeMap<usize, T>,
}

impl<T> Line<T> {
    /// A line in which so many can wait.
    pub fn new(room: usize) -> Self {
        let state = State { next: 0, early: BTreeMap::new() };
        Self { room, state: Mutex::new(state), moved: Condvar::new(), broken: AtomicBool::new(false) }
    }

    /// Takes in what has a number, and calls `work` for everything whose turn has come with it, in order. Waits only where the line is full.
    ///
    /// # Errors
    /// What `work` fails with; [`Error::Cancelled`] when a turn before this one failed.
    pub fn join(&self, number: usize, item: T, control: &Control, mut work: impl FnMut(T) -> Result<()>) -> Result<()> {
        let stopped = || self.broken.load(Ordering::Relaxed) || control.cancelled();
        let mut state = self.lock();
        while state.next != number && state.early.len() >= self.room && !stopped() {
            // Not for ever: whoever has the turn before this one may have seen that the run was cancelled and gone.
            let wait = std::time::Duration::from_millis(50);
            state = self.moved.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
        if stopped() {
            return Err(Error::Cancelled);
        }
        if state.next != number {
            state.early.insert(number, item);
            return Ok(());
        }
        let mut now = Some(item);
        while let Some(item) = now {
            drop(state);
            work(item).inspect_err(|_| self.give_up())?;
            state = self.lock();
            state.next += 1;
            let next = state.next;
            now = state.early.remove(&next);
            self.moved.notify_all();
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes everyone who waits: a turn that they wait for will not come.
    pub fn give_up(&self) {
        self.broken.store(true, Ordering::Relaxed);
        drop(self.lock());
        self.moved.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_early_is_taken_in_order() {
        for (threads, room) in [(1, 0), (2, 0), (2, 1), (4, 2), (8, 3)] {
            let (line, taken, next) = (Line::new(room), Mutex::new(Vec::new()), Mutex::new(0));
            std::thread::scope(|scope| {
                for _ in 0..threads {
                    scope.spawn(|| {
                        loop {
                            let number = {
                                let mut next = next.lock().unwrap();
                                *next += 1;
                                *next - 1
                            };
                            if number >= 500 {
                                return;
                            }
                            // Some take longer than others.
                            std::thread::sleep(std::time::Duration::from_micros(number as u64 * 7 % 40));
                            let take = |item| {
                                taken.lock().unwrap().push(item);
                                Ok(())
                            };
                            line.join(number, number, &Control::default(), take).unwrap();
                        }
                    });
                }
            });
            assert_eq!(taken.into_inner().unwrap(), (0..500).collect::<Vec<_>>());
        }
    }

    #[test]
    fn nobody_waits_for_a_turn_that_will_not_come() {
        let (line, control) = (Line::new(0), Control::default());
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| line.join(1, (), &control, |()| Ok(())));
            let failed = line.join(0, (), &control, |()| Err(Error::Usage("broken".into())));
            assert!(matches!(failed, Err(Error::Usage(_))));
            assert!(matches!(waiting.join().unwrap(), Err(Error::Cancelled)));
        });
    }
}
