//! Tasks: who runs on each vCPU, and everybody else.

use std::collections::HashSet;

use serde::Serialize;

use crate::kernel::KERNEL_HALF;
use crate::{Registers, View};

/// Most tasks that are listed.
const MAX_TASKS: usize = 1 << 16;
/// TASK_COMM_LEN.
const COMM: usize = 16;
/// PID_MAX_LIMIT.
const MAX_PID: u32 = 1 << 22;
const MAX_ARGS: u64 = 4096;
const MAX_CPUS: u32 = 8192;
const PF_KTHREAD: u32 = 0x0020_0000;

/// A task: a thread of a process, or of the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Task {
    /// Address of its `task_struct`.
    pub address: u64,
    /// Number of the thread.
    pub pid: u32,
    /// Number of the process.
    pub tgid: u32,
    /// Number of the parent process.
    pub parent: Option<u32>,
    /// Name.
    pub comm: String,
    /// Letter of its state, as ps(1) has it; `?` if it is not known.
    pub state: char,
    /// A thread of the kernel.
    pub kernel: bool,
    /// CPU that it runs on, or ran on last.
    pub cpu: Option<u32>,
    /// Owner, as the first user namespace numbers it.
    pub uid: Option<u32>,
    /// Time on a CPU, in nanoseconds.
    pub cpu_ns: Option<u64>,
    /// When it began, in nanoseconds since boot.
    pub start_ns: Option<u64>,
    /// Bytes of address space.
    pub virtual_bytes: Option<u64>,
    /// Bytes in memory; some kernels count a part of it elsewhere.
    pub resident_bytes: Option<u64>,
    /// Address of its `mm_struct`; 0 for none.
    #[serde(skip)]
    pub mm: u64,
    /// Kernel stack, lowest address.
    #[serde(skip)]
    pub stack: u64,
}

/// What a vCPU is at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Running {
    /// Number of the vCPU.
    pub vcpu: usize,
    /// Number that the guest gives it.
    pub cpu: Option<u32>,
    /// In user mode.
    pub user: bool,
    /// In HLT.
    pub halted: bool,
    /// The task, if it is known.
    pub task: Option<Task>,
}

impl View<'_> {
    /// The task at `address`; `None` if what is there is none.
    #[must_use]
    pub fn task(&self, address: u64) -> Option<Task> {
        let (layout, memory) = (&self.kernel.layout.task, &self.space);
        if address < KERNEL_HALF || !address.is_multiple_of(8) {
            return None;
        }
        let word = |offset: Option<u64>| memory.u64(address.checked_add(offset?)?);
        let half = |offset: Option<u64>| memory.u32(address.checked_add(offset?)?);
        let (pid, tgid) = (half(layout.pid)?, half(layout.tgid)?);
        let stack = word(layout.stack)?;
        if pid > MAX_PID || tgid > MAX_PID || stack < KERNEL_HALF || stack & 0xfff != 0 {
            return None;
        }
        let comm = memory.text(address.checked_add(layout.comm?)?, COMM)?;
        if comm.len() >= COMM || comm.contains(|c: char| c.is_control()) {
            return None;
        }
        let mm = word(layout.mm).filter(|mm| *mm == 0 || *mm >= KERNEL_HALF)?;
        let state = half(layout.state).zip(half(layout.exit_state));
        let kernel = half(layout.flags).map_or(mm == 0, |flags| flags & PF_KTHREAD != 0);
        let uid = || memory.u32(word(layout.cred)?.checked_add(layout.uid?)?);
        let parent = || memory.u32(word(layout.parent)?.checked_add(layout.tgid?)?);
        let runtime = || word(layout.runtime);
        let ticks = || Some(word(layout.utime)?.saturating_add(word(layout.stime)?));
        let pages = |offset: Option<u64>| memory.u64(mm.checked_add(offset?)?);
        Some(Task {
            address,
            pid,
            tgid,
            parent: parent().filter(|pid| *pid <= MAX_PID),
            comm,
            state: state.map_or('?', |(state, exit)| letter(state, exit, kernel && pid > 0)),
            kernel,
            cpu: half(layout.cpu).filter(|cpu| *cpu < MAX_CPUS),
            uid: uid(),
            cpu_ns: runtime().filter(|ns| *ns > 0).or_else(ticks),
            start_ns: word(layout.start).or_else(|| word(layout.start_unique)),
            virtual_bytes: (mm != 0)
                .then(|| pages(self.kernel.layout.memory.total)?.checked_mul(4096))
                .flatten(),
            resident_bytes: (mm != 0).then(|| self.resident(mm)).flatten(),
            mm,
            stack,
        })
    }

    /// Pages of files, of anonymous memory and of shared memory.
    fn resident(&self, mm: u64) -> Option<u64> {
        let layout = &self.kernel.layout.memory;
        let (first, step) = match (layout.rss_count, layout.percpu_counter, self.kernel.layout.rss_step) {
            (Some(count), ..) => (count, 8),
            (None, Some(count), Some(step)) => (count, step),
            _ => return None,
        };
        let at = mm.checked_add(layout.rss?)?.checked_add(first)?;
        // Files, anonymous, (swapped out), shared.
        let sum = [0, 1, 3].iter().try_fold(0i64, |sum, kind| {
            let pages = self.space.u64(at.checked_add(kind * step)?)?.cast_signed();
            sum.checked_add(pages)
        })?;
        u64::try_from(sum).ok()?.checked_mul(4096)
    }

    /// Address of the task that a vCPU runs.
    #[must_use]
    pub fn current_address(&self, vcpu: &Registers) -> Option<u64> {
        let layout = &self.kernel.layout;
        let at = match layout.hot_task {
            Some(offset) => {
                let hot = self.kernel.percpu_place("pcpu_hot")?;
                return self.space.u64(self.percpu_base(vcpu)?.wrapping_add(hot).wrapping_add(offset));
            }
            None => self.percpu_u64(vcpu, "current_task"),
        };
        at.filter(|at| *at >= KERNEL_HALF)
    }

    /// The task that a vCPU runs.
    #[must_use]
    pub fn current(&self, vcpu: &Registers) -> Option<Task> {
        self.task(self.current_address(vcpu)?)
    }

    /// The number that the guest gives a vCPU.
    #[must_use]
    pub fn cpu_number(&self, vcpu: &Registers) -> Option<u32> {
        let base = self.percpu_base(vcpu)?;
        let place = match self.kernel.layout.hot_cpu {
            Some(offset) => self.kernel.percpu_place("pcpu_hot")?.wrapping_add(offset),
            None => self.kernel.percpu_place("cpu_number")?,
        };
        self.space.u32(base.wrapping_add(place)).filter(|cpu| *cpu < MAX_CPUS)
    }

    /// What each vCPU is at.
    #[must_use]
    pub fn running(&self) -> Vec<Running> {
        let each = self.vcpus.iter().enumerate();
        each.map(|(index, vcpu)| Running {
            vcpu: index,
            cpu: self.cpu_number(vcpu),
            user: vcpu.user(),
            halted: vcpu.halted,
            task: self.current(vcpu),
        })
        .collect()
    }

    /// All tasks, threads among them, by number. The idle tasks of the CPUs are not among them.
    #[must_use]
    pub fn tasks(&self) -> Vec<Task> {
        let layout = &self.kernel.layout.task;
        let mut all: Vec<Task> = Vec::new();
        let Some(list) = layout.tasks else { return all };
        let mut seen = HashSet::new();
        for start in self.list_starts() {
            let mut at = start;
            while all.len() < MAX_TASKS && seen.insert(at) {
                let Some(task) = self.task(at) else { break };
                // The first task of all is CPU 0's idle task.
                if task.pid != 0 {
                    self.threads(&task, &mut all);
                }
                let Some(next) = self.space.u64(at.wrapping_add(list)) else { break };
                at = next.wrapping_sub(list);
            }
        }
        all.sort_by_key(|task| (task.tgid, task.pid));
        all.dedup_by_key(|task| task.address);
        all
    }

    /// Tasks that are in the list of all processes.
    fn list_starts(&self) -> Vec<u64> {
        let init = self.kernel.symbols().address("init_task");
        let leader = |vcpu: &Registers| {
            let current = self.current(vcpu).filter(|task| task.pid != 0)?;
            self.space.u64(current.address.checked_add(self.kernel.layout.task.leader?)?)
        };
        init.into_iter().chain(self.vcpus.iter().filter_map(leader)).collect()
    }

    /// The threads of a process whose first is `leader`.
    fn threads(&self, leader: &Task, all: &mut Vec<Task>) {
        let layout = &self.kernel.layout.task;
        all.push(leader.clone());
        let ends = || {
            let signal = self.space.u64(leader.address.checked_add(layout.signal?)?)?;
            Some((signal.checked_add(layout.thread_head?)?, layout.thread_node?))
        };
        let Some((head, node)) = ends() else { return };
        let mut seen = HashSet::from([head]);
        let mut at = self.space.u64(head);
        while let Some(place) = at.filter(|at| all.len() < MAX_TASKS && seen.insert(*at)) {
            let Some(task) = self.task(place.wrapping_sub(node)) else { break };
            if task.tgid != leader.tgid {
                break;
            }
            if task.address != leader.address {
                all.push(task);
            }
            at = self.space.u64(place);
        }
    }

    /// The command line of a process; empty for what has none.
    #[must_use]
    pub fn arguments(&self, task: &Task) -> Vec<String> {
        let layout = &self.kernel.layout.memory;
        let read = || {
            let field = |offset: Option<u64>| self.space.u64(task.mm.checked_add(offset?)?);
            let (start, end) = (field(layout.arg_start)?, field(layout.arg_end)?);
            let space = self.user_space(task.mm)?;
            space.bytes(start, end.checked_sub(start)?.min(MAX_ARGS), MAX_ARGS as usize)
        };
        let bytes = if task.mm == 0 { Vec::new() } else { read().unwrap_or_default() };
        let text = String::from_utf8_lossy(&bytes);
        let text = text.trim_end_matches('\0');
        if text.is_empty() { Vec::new() } else { text.split('\0').map(str::to_owned).collect() }
    }
}

/// Letter of a state (Linux, include/linux/sched.h and fs/proc/array.c).
fn letter(state: u32, exit: u32, kernel: bool) -> char {
    const UNINTERRUPTIBLE: u32 = 2;
    const NO_LOAD: u32 = 0x400;
    if exit & 0x20 != 0 {
        return 'Z';
    }
    if exit & 0x10 != 0 {
        return 'X';
    }
    match state & 0xff {
        // A thread of the kernel that waits for work waits so that it does not count as load.
        UNINTERRUPTIBLE if state & NO_LOAD != 0 && kernel => 'I',
        0 => 'R',
        s if s & 1 != 0 => 'S',
        s if s & 2 != 0 => 'D',
        s if s & 4 != 0 => 'T',
        s if s & 8 != 0 => 't',
        s if s & 0x40 != 0 => 'P',
        s if s & 0x80 != 0 => 'X',
        _ => '?',
    }
}
