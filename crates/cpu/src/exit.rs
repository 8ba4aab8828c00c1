//! [`Exit`] and [`Answer`].

/// Why a vCPU stopped running guest code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The guest reads a port; answer [`Answer::Data`].
    PortIn {
        /// Port number.
        port: u16,
        /// Bytes: 1, 2 or 4.
        size: u8,
    },
    /// The guest wrote a port; answer [`Answer::None`].
    PortOut {
        /// Port number.
        port: u16,
        /// Bytes: 1, 2 or 4.
        size: u8,
        /// What it wrote, zero-extended.
        data: u32,
    },
    /// The guest reads physical memory that is not RAM; answer [`Answer::Data`].
    MmioRead {
        /// Physical address.
        gpa: u64,
        /// Bytes: 1, 2, 4 or 8; never crosses a page.
        size: u8,
    },
    /// The guest wrote physical memory that is not RAM; answer [`Answer::None`].
    MmioWrite {
        /// Physical address.
        gpa: u64,
        /// Bytes: 1, 2, 4 or 8.
        size: u8,
        /// What it wrote, zero-extended.
        data: u64,
    },
    /// RDMSR of a register that is not the processor's own (local APIC and others); answer
    /// [`Answer::Data`] or [`Answer::Fault`].
    MsrRead {
        /// Index.
        index: u32,
    },
    /// WRMSR likewise; answer [`Answer::None`] or [`Answer::Fault`]. `IA32_TSC_ADJUST` is the processor's own
    /// and only told, after it has changed (also by a write of the TSC): answer [`Answer::None`].
    MsrWrite {
        /// Index.
        index: u32,
        /// Value.
        value: u64,
    },
    /// HLT with nothing to wake it (or waiting for SIPI): sleep until kicked, then run again.
    Halt,
    /// Triple fault: the machine resets or stops.
    Shutdown,
    /// VMCALL or VMMCALL; answer [`Answer::Data`] with the result for RAX.
    Hypercall {
        /// RAX: number.
        number: u64,
        /// RBX, RCX, RDX, RSI.
        args: [u64; 4],
    },
    /// The debugger's condition is met; the state is at `DebugEvent::rip`.
    Debug(DebugEvent),
    /// As many instructions are retired as [`crate::Vcpu::set_limit`] allows.
    Limit,
    /// Kicked by [`wardian_irq::Kick`] for a reason that is not the guest's.
    Interrupted,
}

/// Which condition of the debugger is met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DebugEvent {
    /// One instruction was executed.
    Step,
    /// Before the instruction at this linear address.
    Breakpoint(u64),
    /// After an access to this linear address.
    Watchpoint(u64),
}

/// What completes an [`Exit`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Nothing to hand back.
    None,
    /// The value read, zero-extended.
    Data(u64),
    /// The access is refused: the guest gets #GP(0).
    Fault,
}
