//! [`Moment`]: what must be copied of a vCPU while it stands still, to be understood after it has gone on.

use std::ops::Range;

use crate::kernel::KERNEL_HALF;
use crate::{Physical, Registers, Space, Task, View};

const PAGE: u64 = 4096;
/// Pages of each kernel stack: THREAD_SIZE, and interrupt stacks.
const KERNEL_PAGES: u64 = 4;
/// Pages of a user stack.
const USER_PAGES: u64 = 16;

/// A vCPU at one moment: registers, task, and the pages of its stacks.
#[derive(Clone, Debug, Default)]
pub struct Moment {
    /// Number of the vCPU.
    pub vcpu: usize,
    /// Registers.
    pub registers: Registers,
    /// The task.
    pub task: Option<Task>,
    pages: Vec<(u64, Vec<u8>)>,
}

impl View<'_> {
    /// Copies what there is to see of vCPU `index` now. To be called while it stands still; it takes some microseconds.
    #[must_use]
    pub fn moment(&self, index: usize, registers: &Registers) -> Moment {
        let task = self.current(registers);
        let mut moment = Moment { vcpu: index, registers: registers.clone(), task: None, pages: Vec::new() };
        let mut user = registers.start();
        if !registers.user() {
            moment.copy(&self.space, registers.rsp(), KERNEL_PAGES);
            if let Some(task) = &task {
                // Where the interrupt came from, and where user mode was left.
                moment.copy(&self.space, task.stack, KERNEL_PAGES);
                user = self.saved_user(task).unwrap_or(user);
            }
        }
        if let Some(task) = task.as_ref().filter(|task| task.mm != 0 && user.sp < KERNEL_HALF)
            && let Some(space) = self.user_space(task.mm)
        {
            moment.copy(&space, user.sp, USER_PAGES);
        }
        moment.task = task;
        moment
    }
}

impl Moment {
    fn copy(&mut self, space: &Space<'_>, from: u64, pages: u64) {
        for number in 0..pages {
            let at = (from & !(PAGE - 1)).checked_add(number * PAGE);
            let Some(gpa) = at.and_then(|at| space.translate(at)) else { return };
            if self.pages.iter().any(|(known, _)| *known == gpa) {
                continue;
            }
            let mut page = vec![0; PAGE as usize];
            if !space.memory().read(gpa, &mut page) {
                return;
            }
            self.pages.push((gpa, page));
        }
    }

    /// Memory as it was at the moment, as far as it was copied, and as it is elsewhere.
    #[must_use]
    pub fn frozen<'a>(&'a self, memory: &'a dyn Physical) -> Frozen<'a> {
        Frozen { moment: self, memory }
    }
}

/// Memory with the pages of a [`Moment`].
pub struct Frozen<'a> {
    moment: &'a Moment,
    memory: &'a dyn Physical,
}

impl Physical for Frozen<'_> {
    fn read(&self, gpa: u64, out: &mut [u8]) -> bool {
        let within = (gpa & (PAGE - 1)) as usize;
        let page = || self.moment.pages.iter().find(|(at, _)| *at == gpa & !(PAGE - 1));
        // Larger reads are of tables, which do not change.
        match page().filter(|_| within + out.len() <= PAGE as usize) {
            Some((_, page)) => {
                out.copy_from_slice(&page[within..within + out.len()]);
                true
            }
            None => self.memory.read(gpa, out),
        }
    }

    fn data(&self) -> Vec<Range<u64>> {
        self.memory.data()
    }
}

#[cfg(test)]
mod tests {
    use super::Moment;
    use crate::Physical;

    #[test]
    fn what_was_copied_stays() {
        let moment = Moment { pages: vec![(4096, vec![7; 4096])], ..Moment::default() };
        let memory = vec![1u8; 3 * 4096];
        let frozen = moment.frozen(&memory);
        let mut two = [0; 2];
        for (at, bytes) in [(4096, [7, 7]), (8190, [7, 7]), (8192, [1, 1]), (4094, [1, 1])] {
            assert!(frozen.read(at, &mut two));
            assert_eq!(two, bytes, "{at}");
        }
        assert!(!frozen.read(3 * 4096, &mut two));
    }
}
