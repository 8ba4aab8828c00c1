//! [`Registers`]: what of a vCPU's state tells where it is.

use serde::{Deserialize, Serialize};
use wardian_cpu::{Activity, CpuState};

const LSTAR: u32 = 0xc000_0082;
const KERNEL_GS_BASE: u32 = 0xc000_0102;
const FS: usize = 4;
const GS: usize = 5;
const CR0_PG: u64 = 1 << 31;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;

/// The registers of one vCPU that are looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8-R15.
    pub gpr: [u64; 16],
    /// Next instruction, linear.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// Current privilege level.
    pub cpl: u8,
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
    /// Base of FS.
    pub fs_base: u64,
    /// Base of GS.
    pub gs_base: u64,
    /// What SWAPGS exchanges it for.
    pub kernel_gs_base: u64,
    /// Where SYSCALL goes.
    pub lstar: u64,
    /// Base of the interrupt descriptor table.
    pub idt: u64,
    /// In HLT.
    pub halted: bool,
}

impl Registers {
    /// RSP.
    #[must_use]
    pub fn rsp(&self) -> u64 {
        self.gpr[4]
    }

    /// RBP.
    #[must_use]
    pub fn rbp(&self) -> u64 {
        self.gpr[5]
    }

    /// In user mode.
    #[must_use]
    pub fn user(&self) -> bool {
        self.cpl == 3
    }

    /// Levels of the page tables: 4 or 5; `None` outside of long mode.
    #[must_use]
    pub fn levels(&self) -> Option<u8> {
        (self.cr0 & CR0_PG != 0 && self.efer & EFER_LMA != 0).then_some(if self.cr4 & CR4_LA57 == 0 {
            4
        } else {
            5
        })
    }
}

impl From<&CpuState> for Registers {
    fn from(state: &CpuState) -> Registers {
        let msr = |index| state.msrs.iter().find(|msr| msr.index == index).map_or(0, |msr| msr.value);
        let cs = &state.segments[CpuState::CS];
        Registers {
            gpr: state.gpr,
            // In long mode code segments have base 0; before, the address is what counts as well.
            rip: if cs.long() { state.rip } else { cs.base.wrapping_add(state.rip) },
            rflags: state.rflags,
            cpl: state.segments[CpuState::SS].dpl(),
            cr0: state.cr0,
            cr3: state.cr3,
            cr4: state.cr4,
            efer: state.efer,
            fs_base: state.segments[FS].base,
            gs_base: state.segments[GS].base,
            kernel_gs_base: msr(KERNEL_GS_BASE),
            lstar: msr(LSTAR),
            idt: state.idtr.base,
            halted: state.activity == Activity::Halted,
        }
    }
}

impl From<CpuState> for Registers {
    fn from(state: CpuState) -> Registers {
        Registers::from(&state)
    }
}
