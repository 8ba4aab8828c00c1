//! What two right processors may do differently.

use std::collections::HashMap;

use iced_x86::{
    Decoder, DecoderOptions, Formatter, GasFormatter, Instruction, Mnemonic, OpAccess, OpKind, Register,
};

use super::rsp::Registers;

/// Why a difference is none, or what an instruction needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Must be the same on both sides.
    Plain,
    /// A repeated string instruction: a stub may stop after each iteration or only at the end.
    Repeated,
    /// Tells of time, of the processor's model or of a device.
    Outside(&'static str),
    /// Sleeps until an interrupt comes: there is none in single steps.
    Halt,
}

/// Where device registers are.
const DEVICES: std::ops::RangeInclusive<u64> = 0xfe00_0000..=0xffff_ffff;

/// CF, PF, AF, ZF, SF, OF: what instructions compute.
const ARITHMETIC: u64 = 0x8d5;
/// TF and RF belong to the stubs.
pub const FLAGS: u64 = !(1 << 8 | 1 << 16);

/// Where QEMU 7.2 is wrong: the guest, the instruction that shows it first, and why. The comparison of that guest
/// ends there, if it has come so far; the guest's own checks and the host's processor (crates/oracle) say that we are
/// right.
const QEMU_IS_WRONG: [(&str, &str, &str); 4] = [
    (
        "fpu",
        "mov (%rbx),%rcx",
        "where QEMU does not notice an x87 stack overflow (Intel SDM vol. 1, 8.5.1.1)",
    ),
    (
        "exceptions",
        "int1",
        "where INT1 stops QEMU's debugger instead of raising #DB (Intel SDM vol. 2A, INT)",
    ),
    (
        "paging",
        "mov 0x",
        "where QEMU does not know a reserved bit of the top level (Intel SDM vol. 3A, table 4-15)",
    ),
    ("modes", "mov 0xFFD,%eax", "where QEMU does not check a segment's limit (Intel SDM vol. 3A, 5.3)"),
];
/// The boot and the first thousands of checks are common ground.
const COMMON_GROUND: u64 = 40_000;

/// Why the instruction `text` of `guest` differs after `steps`, if QEMU is known to be wrong there.
pub fn known(guest: &str, text: &str, steps: u64) -> Option<&'static str> {
    let known = |known: &&(&str, &str, &str)| known.0 == guest && text.starts_with(known.1);
    QEMU_IS_WRONG.iter().find(known).filter(|_| steps >= COMMON_GROUND).map(|known| known.2)
}

/// The processor sets RF in the flags that it pushes for a fault (Intel SDM vol. 3B, 18.3.1.1), QEMU does not: whether
/// that is all that a load shows.
pub fn resume_flag(
    insn: Option<&Instruction>,
    different: &[String],
    us: &Registers,
    them: &Registers,
) -> bool {
    const RF: u64 = 1 << 16;
    insn.is_some_and(|insn| matches!(insn.mnemonic(), Mnemonic::Mov | Mnemonic::Pop | Mnemonic::Movzx))
        && matches!(different, [name] if us.get(name) ^ them.get(name) == RF && us.get(name) & RF != 0)
}

pub struct Rules {
    decoded: HashMap<u64, (Instruction, Kind)>,
}

impl Rules {
    pub fn new() -> Rules {
        Rules { decoded: HashMap::new() }
    }

    /// How wide code is, as far as a stub tells.
    pub fn bitness(registers: &Registers) -> u32 {
        match (registers.get("efer") >> 10 & 1, registers.get("cr0") & 1) {
            (1, _) => 64,
            (_, 1) => 32,
            _ => 16,
        }
    }

    pub fn known(&self, rip: u64) -> bool {
        self.decoded.contains_key(&rip)
    }

    /// Learns the instruction at `rip`.
    pub fn learn(&mut self, rip: u64, bytes: &[u8], bitness: u32) {
        let insn = Decoder::with_ip(bitness, bytes, rip, DecoderOptions::NONE).decode();
        self.decoded.insert(rip, (insn, kind(&insn)));
    }

    pub fn instruction(&self, rip: u64) -> Option<&Instruction> {
        self.decoded.get(&rip).map(|known| &known.0)
    }

    /// What the instruction at `rip` is, its operands being those of `before`.
    pub fn kind(&self, rip: u64, before: &Registers) -> Kind {
        let Some((insn, kind)) = self.decoded.get(&rip) else { return Kind::Plain };
        if *kind == Kind::Plain && touches_device(insn, before) {
            Kind::Outside("device memory")
        } else {
            *kind
        }
    }

    /// The flags that are undefined after the instruction at `rip`.
    pub fn undefined_flags(&self, rip: u64) -> u64 {
        use iced_x86::RflagsBits;
        let Some((insn, _)) = self.decoded.get(&rip) else { return 0 };
        let undefined = insn.rflags_undefined();
        let mut flags = 0;
        for (bit, flag) in [
            (RflagsBits::CF, 1),
            (RflagsBits::PF, 4),
            (RflagsBits::AF, 0x10),
            (RflagsBits::ZF, 0x40),
            (RflagsBits::SF, 0x80),
            (RflagsBits::OF, 0x800),
        ] {
            if undefined & bit != 0 {
                flags |= flag;
            }
        }
        // Shifts and rotates by a count that is not one leave OF undefined (Intel SDM vol. 2B); the tables say
        // so only for constant counts.
        if matches!(
            insn.mnemonic(),
            Mnemonic::Shl
                | Mnemonic::Shr
                | Mnemonic::Sar
                | Mnemonic::Rol
                | Mnemonic::Ror
                | Mnemonic::Rcl
                | Mnemonic::Rcr
                | Mnemonic::Shld
                | Mnemonic::Shrd
                | Mnemonic::Sal
        ) {
            flags |= 0x800 | 0x10;
        }
        // A bit search of zero and a double shift by more than the size (same volume) leave more.
        if matches!(insn.mnemonic(), Mnemonic::Shld | Mnemonic::Shrd | Mnemonic::Bsf | Mnemonic::Bsr) {
            flags |= ARITHMETIC & !0x40;
        }
        flags
    }

    /// Whether the instruction at `rip` writes to a port.
    pub fn is_output(&self, rip: u64) -> bool {
        self.instruction(rip).is_some_and(|insn| insn.mnemonic() == Mnemonic::Out)
    }

    pub fn text(&self, rip: u64) -> String {
        let Some(insn) = self.instruction(rip) else { return "?".to_owned() };
        let mut text = String::new();
        GasFormatter::new().format(insn, &mut text);
        text
    }
}

fn kind(insn: &Instruction) -> Kind {
    match insn.mnemonic() {
        Mnemonic::Hlt | Mnemonic::Mwait => Kind::Halt,
        Mnemonic::Rdtsc | Mnemonic::Rdtscp => Kind::Outside("time-stamp counter"),
        Mnemonic::Cpuid | Mnemonic::Xgetbv => Kind::Outside("processor model"),
        Mnemonic::Rdmsr | Mnemonic::Rdpmc => Kind::Outside("model-specific register"),
        Mnemonic::Rdrand | Mnemonic::Rdseed => Kind::Outside("random number"),
        Mnemonic::In | Mnemonic::Insb | Mnemonic::Insd | Mnemonic::Insw => Kind::Outside("input from a port"),
        _ if insn.is_string_instruction() && (insn.has_rep_prefix() || insn.has_repne_prefix()) => {
            Kind::Repeated
        }
        _ => Kind::Plain,
    }
}

fn touches_device(insn: &Instruction, before: &Registers) -> bool {
    let reads = insn.op_count() > 0
        && (0..insn.op_count()).any(|n| insn.op_kind(n) == OpKind::Memory && access_reads(insn, n));
    if !reads {
        return false;
    }
    let value = |register: Register, _, _| {
        let name = format!("{:?}", register.full_register()).to_lowercase();
        // Segments are flat here.
        Some(if register.is_segment_register() { 0 } else { before.get(&name) })
    };
    insn.virtual_address(0, 0, value)
        .or_else(|| insn.virtual_address(1, 0, value))
        .is_some_and(|at| DEVICES.contains(&at))
}

fn access_reads(insn: &Instruction, n: u32) -> bool {
    let mut factory = iced_x86::InstructionInfoFactory::new();
    let access = factory.info(insn).op_access(n);
    !matches!(access, OpAccess::None | OpAccess::NoMemAccess | OpAccess::Write)
}
