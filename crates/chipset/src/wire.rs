//! From a locked device to its interrupt line, in order and without the device's lock.
//!
//! A device changes a [`Wire`] in its state under its own lock and, having let go of it, hands the wire's
//! count to the [`Output`], which holds the line. Two threads may come to the output in the wrong order;
//! the count tells which news is older, and no rising edge is lost.

use std::sync::{Mutex, MutexGuard, PoisonError};

use wardian_irq::Line;

/// Locks `mutex`; a panic elsewhere does not take the device with it.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The level that a device wants on its line, as the number of transitions so far: odd is high.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wire(u64);

impl Wire {
    pub(crate) fn set(&mut self, level: bool) {
        if self.level() != level {
            self.0 += 1;
        }
    }

    pub(crate) fn level(self) -> bool {
        self.0 & 1 != 0
    }
}

/// A line and how far it has followed its wire. Lock order: this lock, then the interrupt chip's; never
/// taken under a device's lock.
#[derive(Debug)]
pub(crate) struct Output {
    line: Line,
    shown: Mutex<Wire>,
}

impl Output {
    pub(crate) fn new(line: Line) -> Output {
        Output { line, shown: Mutex::default() }
    }

    /// Brings the line up to `wire`; several missed edges become one.
    pub(crate) fn publish(&self, wire: Wire) {
        let mut shown = lock(&self.shown);
        if wire.0 <= shown.0 {
            return;
        }
        // Did the wire rise since? Then the line must be seen to rise, whatever it shows now.
        let rose = wire.0.div_ceil(2) > shown.0.div_ceil(2);
        if shown.level() {
            self.line.set(false);
        }
        if rose {
            self.line.set(true);
            if !wire.level() {
                self.line.set(false);
            }
        }
        *shown = wire;
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::{Output, Wire, lock};
    use std::sync::{Arc, Mutex};
    use wardian_irq::{Delivery, Gsi, IrqChip, Line, MsiMessage};

    /// Remembers every call.
    #[derive(Default)]
    pub(crate) struct Recorder {
        calls: Mutex<Vec<(u32, bool)>>,
        told: Mutex<usize>,
    }

    impl Recorder {
        pub(crate) fn new() -> Arc<Recorder> {
            Arc::new(Recorder::default())
        }

        pub(crate) fn line(self: &Arc<Self>, gsi: Gsi) -> Line {
            Line::new(Arc::clone(self) as Arc<dyn IrqChip>, gsi)
        }

        /// Level of input `gsi`.
        pub(crate) fn level(&self, gsi: Gsi) -> bool {
            lock(&self.calls).iter().rev().find(|call| call.0 == gsi.0).is_some_and(|call| call.1)
        }

        /// The calls since this was last asked.
        pub(crate) fn news(&self) -> Vec<(u32, bool)> {
            let calls = lock(&self.calls);
            let from = std::mem::replace(&mut *lock(&self.told), calls.len());
            calls[from..].to_vec()
        }

        /// The inputs that are up.
        pub(crate) fn high(&self) -> Vec<u32> {
            let mut inputs: Vec<u32> = lock(&self.calls).iter().map(|call| call.0).collect();
            inputs.sort_unstable();
            inputs.dedup();
            inputs.retain(|gsi| self.level(Gsi(*gsi)));
            inputs
        }

        /// Rising edges of input `gsi` so far.
        pub(crate) fn edges(&self, gsi: Gsi) -> usize {
            let mut level = false;
            let mut edges = 0;
            for (_, now) in lock(&self.calls).iter().filter(|call| call.0 == gsi.0) {
                edges += usize::from(*now && !level);
                level = *now;
            }
            edges
        }
    }

    impl IrqChip for Recorder {
        fn set_line(&self, gsi: Gsi, level: bool) -> Delivery {
            lock(&self.calls).push((gsi.0, level));
            Delivery::Accepted
        }

        fn signal_msi(&self, _message: MsiMessage) -> Delivery {
            Delivery::Masked
        }
    }

    #[test]
    fn late_news_is_ignored_and_no_edge_is_lost() {
        let chip = Recorder::new();
        let output = Output::new(chip.line(Gsi(3)));
        let mut wire = Wire::default();
        wire.set(true);
        let old = wire;
        output.publish(wire);
        wire.set(false);
        wire.set(true);
        output.publish(wire); // the fall was never published, the new edge is
        assert_eq!((chip.edges(Gsi(3)), chip.level(Gsi(3))), (2, true));
        output.publish(old);
        assert!(chip.level(Gsi(3)));
        wire.set(false);
        wire.set(true);
        wire.set(false);
        output.publish(wire);
        assert_eq!((chip.edges(Gsi(3)), chip.level(Gsi(3))), (3, false));
        wire.set(false);
        output.publish(wire);
        assert_eq!(lock(&chip.calls).len(), 6);
    }

    #[test]
    fn a_fall_is_only_a_fall() {
        let chip = Recorder::new();
        let output = Output::new(chip.line(Gsi(3)));
        let mut wire = Wire::default();
        wire.set(true);
        output.publish(wire);
        wire.set(false);
        output.publish(wire);
        assert_eq!(*lock(&chip.calls), [(3, true), (3, false)]);
    }
}
