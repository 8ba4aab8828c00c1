//! Stacks of tasks and vCPUs, with names.

use serde::Serialize;

use crate::kernel::KERNEL_HALF;
use crate::orc::{Address, KernelStack, SavedRegisters, Start};
use crate::{Program, Registers, Task, View};

/// Words that a task which does not run has on its stack (Linux, `struct inactive_task_frame`): R15, R14, R13, R12, RBX,
/// RBP, return address.
const INACTIVE: u64 = 7 * 8;
/// Kernel stacks are of 16 KiB, 32 KiB with KASAN.
const STACK_SIZES: [u64; 2] = [16 << 10, 32 << 10];

/// A frame with its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Frame {
    /// The address.
    pub address: u64,
    /// In user mode.
    pub user: bool,
    /// Where: `[kernel]`, `[module]` with its name, the path of a binary; nothing if it is not known.
    pub object: String,
    /// The function, if it is known.
    pub function: Option<String>,
    /// Bytes behind the beginning of the function, or of the object.
    pub offset: u64,
}

/// Both stacks of a task.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stacks {
    /// The kernel's part.
    pub kernel: KernelStack,
    /// The user's part.
    pub user: Vec<Address>,
}

impl Registers {
    /// Where a walk of the stack begins.
    #[must_use]
    pub fn start(&self) -> Start {
        // RDX, RDI, R10, R13.
        let others = [self.gpr[2], self.gpr[7], self.gpr[10], self.gpr[13]];
        Start { ip: self.rip, sp: self.rsp(), bp: self.rbp(), others: Some(others), exact: true }
    }
}

impl View<'_> {
    /// Name of kernel code at `address`: object, function with offset.
    #[must_use]
    pub fn kernel_name(&self, address: u64) -> Option<(String, String, u64)> {
        let symbols = self.kernel.symbols();
        let within = |start: &str, end: &str| {
            symbols.address(start).zip(symbols.address(end)).is_some_and(|(a, b)| (a..b).contains(&address))
        };
        if within("_stext", "_etext") || within("_sinittext", "_einittext") {
            let (symbol, offset) = symbols.code(address)?;
            return Some(("[kernel]".to_owned(), symbol.name.to_owned(), offset));
        }
        let module = self.modules().iter().find(|module| module.holds(address))?;
        let (symbol, offset) = module.symbols.code(address)?;
        Some((format!("[{}]", module.name), symbol.name.to_owned(), offset))
    }

    /// Walks a kernel stack by the way that the kernel has tables for.
    #[must_use]
    pub fn kernel_stack(&self, start: Start) -> KernelStack {
        if self.has_orc() {
            self.kernel_stack_by_orc(start)
        } else {
            self.kernel_stack_by_frame_pointer(start)
        }
    }

    /// Where a task that does not run will go on in the kernel.
    #[must_use]
    pub fn asleep_at(&self, task: &Task) -> Option<Start> {
        let sp = self.space.u64(task.address.checked_add(self.kernel.layout.task.sp?)?)?;
        let within = STACK_SIZES.iter().any(|size| sp.wrapping_sub(task.stack) < *size);
        if sp < KERNEL_HALF || !within {
            return None;
        }
        let word = |index: u64| self.space.u64(sp + index * 8);
        let (bp, ip) = (word(5)?, word(6)?);
        // A task that never ran begins at the end of fork, whose entry is for the instruction itself.
        let fresh = self
            .kernel
            .symbols()
            .address("ret_from_fork_asm")
            .or(self.kernel.symbols().address("ret_from_fork"));
        Some(Start { ip, sp: sp + INACTIVE, bp, others: None, exact: Some(ip) == fresh })
    }

    /// The user registers that are saved at the bottom of a task's kernel stack.
    #[must_use]
    pub fn saved_user(&self, task: &Task) -> Option<Start> {
        STACK_SIZES.iter().find_map(|size| {
            let at = task.stack.checked_add(size - SavedRegisters::SIZE)?;
            let registers = SavedRegisters::read(&self.space, at)?;
            let plausible = registers.user() && registers.start(0).ip < KERNEL_HALF;
            plausible.then(|| registers.start(registers.bp()))
        })
    }

    /// The vCPU that runs a task.
    #[must_use]
    pub fn runs(&self, task: &Task) -> Option<&Registers> {
        self.vcpus.iter().find(|vcpu| self.current_address(vcpu) == Some(task.address))
    }

    /// Both stacks of a task, which runs on a vCPU or does not.
    #[must_use]
    pub fn stacks(&self, task: &Task, program: Option<&mut Program>) -> Stacks {
        match self.runs(task) {
            Some(vcpu) => self.stacks_on(vcpu, task, program),
            None => {
                let kernel = self.asleep_at(task).map(|start| self.kernel_stack(start)).unwrap_or_default();
                let user = kernel.user.or_else(|| self.saved_user(task));
                self.with_user(kernel, user, task, program)
            }
        }
    }

    /// Both stacks of a task that runs on a vCPU with these registers.
    #[must_use]
    pub fn stacks_on(&self, vcpu: &Registers, task: &Task, program: Option<&mut Program>) -> Stacks {
        if vcpu.user() {
            return self.with_user(KernelStack::default(), Some(vcpu.start()), task, program);
        }
        let kernel = self.kernel_stack(vcpu.start());
        let user = kernel.user.or_else(|| self.saved_user(task));
        self.with_user(kernel, user, task, program)
    }

    fn with_user(
        &self,
        kernel: KernelStack,
        user: Option<Start>,
        task: &Task,
        program: Option<&mut Program>,
    ) -> Stacks {
        let Some(start) = user.filter(|_| task.mm != 0 && !task.kernel) else {
            return Stacks { kernel, user: Vec::new() };
        };
        let user = match program.zip(self.user_space(task.mm)) {
            Some((program, space)) => program.stack(&space, start),
            None => vec![Address { ip: start.ip, exact: true }],
        };
        Stacks { kernel, user }
    }

    /// Gives names.
    #[must_use]
    pub fn frames(&self, stacks: &Stacks, program: Option<&Program>) -> Vec<Frame> {
        let place = |address: &Address| if address.exact { address.ip } else { address.ip.wrapping_sub(1) };
        let kernel = stacks.kernel.frames.iter().map(|address| {
            let name = self.kernel_name(place(address));
            let back = u64::from(!address.exact);
            let (object, function, offset) = match name {
                Some((object, function, offset)) => (object, Some(function), offset.wrapping_add(back)),
                None => (String::new(), None, 0),
            };
            Frame { address: address.ip, user: false, object, function, offset }
        });
        let user = stacks.user.iter().map(|address| {
            let name = program.and_then(|program| program.name(place(address)));
            let back = u64::from(!address.exact);
            let (object, function, offset) = match name {
                Some(name) => match name.symbol {
                    Some((function, offset)) => (name.object, Some(function), offset.wrapping_add(back)),
                    None => (name.object, None, name.object_offset.wrapping_add(back)),
                },
                None => (String::new(), None, 0),
            };
            Frame { address: address.ip, user: true, object, function, offset }
        });
        kernel.chain(user).collect()
    }
}
