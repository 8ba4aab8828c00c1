//! What the tests of several devices share.

pub(crate) mod twin;

use std::sync::{Arc, Mutex};

use wardian_bus::{Access, Device};
use wardian_time::{Nanos, ResumePolicy, TimeBase, TimerQueue};

use crate::wire::lock;

/// An access by vCPU 0.
pub(crate) fn at(offset: u64) -> Access {
    Access { offset, vcpu: 0 }
}

/// Reads `N` bytes at `offset`.
pub(crate) fn read<const N: usize>(device: &dyn Device, offset: u64) -> [u8; N] {
    let mut data = [0; N];
    device.read(at(offset), &mut data);
    data
}

/// A writer whose bytes the test can look at.
#[derive(Clone, Debug, Default)]
pub(crate) struct SharedBuffer(Arc<Mutex<Vec<u8>>>);

impl SharedBuffer {
    pub(crate) fn take(&self) -> Vec<u8> {
        std::mem::take(&mut lock(&self.0))
    }
}

impl std::io::Write for SharedBuffer {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        lock(&self.0).extend_from_slice(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Guest time that the test moves, with its queue.
pub(crate) struct Clock {
    pub(crate) base: Arc<TimeBase>,
    pub(crate) queue: Arc<TimerQueue>,
}

impl Clock {
    /// Running, at guest time 0 and the Unix epoch.
    pub(crate) fn new() -> Clock {
        Clock::at_wall(Nanos(0))
    }

    /// Running, at guest time 0 and the wall clock `wall`.
    pub(crate) fn at_wall(wall: Nanos) -> Clock {
        let base = TimeBase::manual(wall);
        base.resume(ResumePolicy::Freeze);
        let queue = TimerQueue::new(Arc::clone(&base));
        Clock { base, queue }
    }

    /// One that stands where this one does, with nothing in its queue.
    pub(crate) fn twin(&self) -> Clock {
        let twin = Clock::at_wall(self.base.wall_at_zero());
        twin.base.advance(self.base.now());
        twin
    }

    /// Moves on by `by`, stopping at every deadline on the way.
    pub(crate) fn run(&self, by: Nanos) {
        let end = self.base.now().saturating_add(by);
        while let Some(next) = self.queue.next_deadline().filter(|next| *next <= end) {
            self.base.advance(next.saturating_sub(self.base.now()));
            self.queue.run_due();
        }
        self.base.advance(end.saturating_sub(self.base.now()));
    }
}
