//! [`CpuState`]: everything that a processor is between two instructions.

use serde::{Deserialize, Serialize};
use wardian_state::Record;

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Visible selector.
    pub selector: u16,
    /// Base address.
    pub base: u64,
    /// Limit in bytes, granularity applied.
    pub limit: u32,
    /// Access rights as in the descriptor's bits 40-55 (type, S, DPL, P, AVL, L, D/B, G at bits 0-15 with
    /// the limit bits zero); bit 16 set means unusable (a null selector).
    pub rights: u32,
}

impl Segment {
    /// Bit of `rights`: the segment is unusable.
    pub const UNUSABLE: u32 = 1 << 16;

    /// Descriptor type (bits 0-3).
    #[must_use]
    pub fn kind(&self) -> u32 {
        self.rights & 15
    }
    /// Code or data segment, not a system one.
    #[must_use]
    pub fn is_code_or_data(&self) -> bool {
        self.rights & (1 << 4) != 0
    }
    /// Descriptor privilege level.
    #[must_use]
    pub fn dpl(&self) -> u8 {
        ((self.rights >> 5) & 3) as u8
    }
    /// Present.
    #[must_use]
    pub fn present(&self) -> bool {
        self.rights & (1 << 7) != 0
    }
    /// 64-bit code segment (L).
    #[must_use]
    pub fn long(&self) -> bool {
        self.rights & (1 << 13) != 0
    }
    /// Default operand size 32, or big stack (D/B).
    #[must_use]
    pub fn big(&self) -> bool {
        self.rights & (1 << 14) != 0
    }
    /// Unusable (loaded with a null selector).
    #[must_use]
    pub fn unusable(&self) -> bool {
        self.rights & Self::UNUSABLE != 0
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DescriptorTable {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// What a vCPU is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activity {
    /// Executing instructions.
    #[default]
    Running,
    /// In HLT.
    Halted,
    /// An application processor before its first start-up IPI.
    WaitForSipi,
    /// After a triple fault.
    Shutdown,
}

/// A model-specific register and its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msr {
    /// Index.
    pub index: u32,
    /// Value.
    pub value: u64,
}

/// A state that no processor can be in.
#[derive(Debug, thiserror::Error)]
#[error("{field} = {value:#x} is not possible: {why}")]
pub struct InvalidState {
    /// The register.
    pub field: &'static str,
    /// Its value.
    pub value: u64,
    /// The rule that it breaks.
    pub why: &'static str,
}

/// The architectural state of one vCPU, neutral between engines. It is what is saved, as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuState {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8-R15 (encoding order).
    pub gpr: [u64; 16],
    /// Offset of the next instruction in CS.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS (encoding order).
    pub segments: [Segment; 6],
    /// LDTR.
    pub ldtr: Segment,
    /// TR.
    pub tr: Segment,
    /// GDTR.
    pub gdtr: DescriptorTable,
    /// IDTR.
    pub idtr: DescriptorTable,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// CR8 is the local APIC's; here only for display.
    pub cr8: u64,
    /// EFER.
    pub efer: u64,
    /// XCR0.
    pub xcr0: u64,
    /// DR0-DR3, DR6, DR7.
    pub dr: [u64; 6],
    /// FPU, SSE, AVX ... in the standard XSAVE format (Intel SDM vol. 1, 13.4), at least 576 bytes.
    #[serde(with = "wardian_state::hex")]
    pub xsave: Vec<u8>,
    /// Every other model-specific register of the processor (SYSCALL, SYSENTER, kvmclock, PAT, MTRR...).
    pub msrs: Vec<Msr>,
    /// Guest TSC of this vCPU minus that of the time base (`IA32_TSC_ADJUST` effects).
    pub tsc_adjust: u64,
    /// What it is doing.
    pub activity: Activity,
    /// Interrupts are held off for one instruction (STI, MOV SS).
    pub interrupt_shadow: bool,
    /// NMIs are held off until IRET.
    pub nmi_blocked: bool,
    /// An NMI that was taken from the local APIC and not delivered yet.
    pub nmi_owed: bool,
    /// An interrupt that was acknowledged at the local APIC and not delivered yet: its vector.
    pub interrupt_owed: Option<u8>,
}

impl Record for CpuState {
    const KIND: &'static str = "vcpu";
    const VERSION: u16 = 1;
}

impl CpuState {
    /// Index of RSP in `gpr`.
    pub const RSP: usize = 4;
    /// Index of CS in `segments`.
    pub const CS: usize = 1;
    /// Index of SS in `segments`.
    pub const SS: usize = 2;

    /// The state after RESET (Intel SDM vol. 3A, 9.1.1): real mode at FFFF_FFF0h.
    #[must_use]
    pub fn reset() -> CpuState {
        let data = Segment { selector: 0, base: 0, limit: 0xffff, rights: 0x93 };
        let mut xsave = vec![0u8; 4096];
        xsave[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
        xsave[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        let mut segments = [data; 6];
        segments[Self::CS] = Segment { selector: 0xf000, base: 0xffff_0000, limit: 0xffff, rights: 0x9b };
        let mut gpr = [0; 16];
        gpr[2] = 0x600; // family 6 in EDX
        CpuState {
            gpr,
            rip: 0xfff0,
            rflags: 2,
            segments,
            ldtr: Segment { limit: 0xffff, rights: 0x82, ..Segment::default() },
            tr: Segment { limit: 0xffff, rights: 0x8b, ..Segment::default() },
            gdtr: DescriptorTable { base: 0, limit: 0xffff },
            idtr: DescriptorTable { base: 0, limit: 0xffff },
            cr0: 0x6000_0010,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            cr8: 0,
            efer: 0,
            xcr0: 1,
            dr: [0, 0, 0, 0, 0xffff_0ff0, 0x400],
            xsave,
            msrs: Vec::new(),
            tsc_adjust: 0,
            activity: Activity::Running,
            interrupt_shadow: false,
            nmi_blocked: false,
            nmi_owed: false,
            interrupt_owed: None,
        }
    }

    /// The state after INIT from `self` (Intel SDM vol. 3A, table 9-1) of a processor with leaf 1 EAX
    /// `signature`: that after RESET, but caching mode, XCR0, FPU and vector registers, TSC, PAT, MTRRs and
    /// machine-check registers stay. The activity is the caller's business.
    #[must_use]
    pub fn after_init(self, signature: u32) -> CpuState {
        use crate::bits::{cr0, msr};
        let stays = |index: u32| {
            matches!(index, msr::PAT | msr::MTRR_DEF_TYPE | msr::MISC_ENABLE | msr::MCG_STATUS)
                || msr::is_mtrr(index)
        };
        let mut state = CpuState::reset();
        state.gpr[2] = u64::from(signature);
        state.cr0 = (self.cr0 & (cr0::CD | cr0::NW)) | cr0::ET;
        state.xcr0 = self.xcr0;
        state.xsave = self.xsave;
        state.tsc_adjust = self.tsc_adjust;
        state.msrs = self.msrs.into_iter().filter(|msr| stays(msr.index)).collect();
        state
    }
}
