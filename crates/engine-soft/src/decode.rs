//! What the translator needs to know of an instruction: its raw parts for byte emission, and a cached table of
//! attributes by iced-x86 `Code`.

use iced_x86::{
    Code, CpuidFeature, EncodingKind, Instruction, InstructionInfoFactory, MandatoryPrefix, Mnemonic as M,
    OpAccess, OpCodeOperandKind as K, OpKind,
};

/// How the translator treats an instruction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Class {
    /// Not looked at yet.
    #[default]
    Unknown,
    /// Emitted as itself.
    Native,
    /// Left to the interpreter.
    Interpret,
    /// Nothing to do (NOP, prefetch, cache hints).
    Nothing,
    Lea,
    JmpNear,
    JmpIndirect,
    CallNear,
    CallIndirect,
    Ret,
    Jcc,
    Loop,
    Jrcxz,
    PushReg,
    PushImm,
    PopReg,
    Leave,
    /// A system instruction that the mode allows to be emitted.
    System,
}

/// Which processor state an instruction belongs to, for #NM and #UD.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unit {
    #[default]
    Integer,
    X87,
    Sse,
    Avx,
    Evex,
}

/// Where a general register is encoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Field {
    #[default]
    None,
    Reg,
    Rm,
    Vvvv,
    Opcode,
}

/// A general-register operand.
#[derive(Clone, Copy, Debug, Default)]
pub struct GprOperand {
    pub field: Field,
    pub byte: bool,
    pub written: bool,
}

/// Attributes that depend on the `Code` alone.
#[derive(Clone, Copy, Debug, Default)]
pub struct CodeInfo {
    pub class: Class,
    pub unit: Unit,
    pub gprs: [GprOperand; 4],
    pub mem_read: bool,
    pub mem_write: bool,
    /// The host may raise an exception when it executes the instruction.
    pub may_fault: bool,
    /// The first operand is written whole and not read (no need to load it).
    pub first_write_only: bool,
    /// Shift or rotate by CL: with a count of 0 no flag changes.
    pub by_cl: bool,
    /// A 66h prefix belongs in the output in 16-bit code.
    pub wants_66: bool,
    /// A 512-bit register is among the operands.
    pub wide: bool,
}

fn interpreted(m: M) -> bool {
    matches!(
        m,
        M::In
            | M::Out
            | M::Insb
            | M::Insd
            | M::Insw
            | M::Outsb
            | M::Outsd
            | M::Outsw
            | M::Hlt
            | M::Lgdt
            | M::Lidt
            | M::Sgdt
            | M::Sidt
            | M::Lldt
            | M::Sldt
            | M::Ltr
            | M::Str
            | M::Lmsw
            | M::Smsw
            | M::Clts
            | M::Invlpg
            | M::Invpcid
            | M::Invd
            | M::Wbinvd
            | M::Wbnoinvd
            | M::Rdmsr
            | M::Wrmsr
            | M::Rdtsc
            | M::Rdtscp
            | M::Rdpmc
            | M::Rdpid
            | M::Cpuid
            | M::Swapgs
            | M::Rdfsbase
            | M::Rdgsbase
            | M::Wrfsbase
            | M::Wrgsbase
            | M::Xgetbv
            | M::Xsetbv
            | M::Syscall
            | M::Sysenter
            | M::Sysexit
            | M::Sysexitq
            | M::Sysret
            | M::Sysretq
            | M::Iret
            | M::Iretd
            | M::Iretq
            | M::Int
            | M::Int1
            | M::Int3
            | M::Into
            | M::Cli
            | M::Sti
            | M::Pushf
            | M::Pushfd
            | M::Pushfq
            | M::Popf
            | M::Popfd
            | M::Popfq
            | M::Clac
            | M::Stac
            | M::Cld
            | M::Std
            | M::Movsb
            | M::Movsw
            | M::Movsq
            | M::Stosb
            | M::Stosw
            | M::Stosd
            | M::Stosq
            | M::Lodsb
            | M::Lodsw
            | M::Lodsd
            | M::Lodsq
            | M::Scasb
            | M::Scasw
            | M::Scasd
            | M::Scasq
            | M::Cmpsb
            | M::Cmpsw
            | M::Cmpsq
            | M::Xlatb
            | M::Enter
            | M::Bound
            | M::Pusha
            | M::Pushad
            | M::Popa
            | M::Popad
            | M::Aaa
            | M::Aas
            | M::Aam
            | M::Aad
            | M::Daa
            | M::Das
            | M::Salc
            | M::Lar
            | M::Lsl
            | M::Verr
            | M::Verw
            | M::Arpl
            | M::Lds
            | M::Les
            | M::Lfs
            | M::Lgs
            | M::Lss
            | M::Fxsave
            | M::Fxsave64
            | M::Fxrstor
            | M::Fxrstor64
            | M::Xsave
            | M::Xsave64
            | M::Xsavec
            | M::Xsavec64
            | M::Xsaveopt
            | M::Xsaveopt64
            | M::Xsaves
            | M::Xsaves64
            | M::Xrstor
            | M::Xrstor64
            | M::Xrstors
            | M::Xrstors64
            | M::Fsave
            | M::Fnsave
            | M::Frstor
            | M::Fldenv
            | M::Fstenv
            | M::Fnstenv
            | M::Vpgatherdd
            | M::Vpgatherdq
            | M::Vpgatherqd
            | M::Vpgatherqq
            | M::Vgatherdps
            | M::Vgatherdpd
            | M::Vgatherqps
            | M::Vgatherqpd
            | M::Vmaskmovps
            | M::Vmaskmovpd
            | M::Vpmaskmovd
            | M::Vpmaskmovq
            | M::Maskmovdqu
            | M::Vmaskmovdqu
            | M::Maskmovq
            | M::Monitor
            | M::Mwait
            | M::Ud0
            | M::Ud1
            | M::Ud2
            | M::Vmcall
            | M::Vmmcall
            | M::Rsm
            | M::Getsec
            | M::Loope
            | M::Loopne
            | M::Xbegin
            | M::Xend
            | M::Xabort
            | M::Xtest
            | M::Umonitor
            | M::Umwait
            | M::Tpause
            | M::Enqcmd
            | M::Enqcmds
            | M::Movdir64b
            | M::Ptwrite
            | M::INVALID
    )
}

fn classify(insn: &Instruction) -> Class {
    let op = insn.code().op_code();
    let m = insn.mnemonic();
    let kind = |n: u32| if n < insn.op_count() { Some(insn.op_kind(n)) } else { None };
    let is_mem = |n: u32| kind(n) == Some(OpKind::Memory);
    let in_turn =
        (0..insn.op_count()).any(is_mem) && (insn.is_vsib() || crate::sys::evex_ops::packed(m).is_some());
    if op.encoding() == EncodingKind::XOP || (op.encoding() == EncodingKind::EVEX && in_turn) {
        return Class::Interpret;
    }
    match m {
        M::Lea => return Class::Lea,
        M::Nop
        | M::Prefetch
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchw
        | M::Prefetchwt1
        | M::Endbr64
        | M::Endbr32
        | M::Reservednop
        | M::Clflush
        | M::Clflushopt
        | M::Clwb
        | M::Cldemote => {
            return Class::Nothing;
        }
        M::Ret => return Class::Ret,
        M::Leave => return Class::Leave,
        M::Loop => return Class::Loop,
        M::Jcxz | M::Jecxz | M::Jrcxz => return Class::Jrcxz,
        M::Movsd if op.encoding() == EncodingKind::Legacy && insn.is_string_instruction() => {
            return Class::Interpret;
        }
        M::Cmpsd if insn.is_string_instruction() => return Class::Interpret,
        _ => {}
    }
    if interpreted(m) {
        return Class::Interpret;
    }
    let code = insn.code();
    if code.is_jcc_short_or_near() {
        return Class::Jcc;
    }
    if code.is_jmp_short_or_near() {
        return Class::JmpNear;
    }
    if code.is_call_near() {
        return Class::CallNear;
    }
    if code.is_jmp_near_indirect() {
        return Class::JmpIndirect;
    }
    if code.is_call_near_indirect() {
        return Class::CallIndirect;
    }
    if code.is_jmp_far()
        || code.is_call_far()
        || code.is_jmp_far_indirect()
        || code.is_call_far_indirect()
        || m == M::Retf
    {
        return Class::Interpret;
    }
    match m {
        M::Push => {
            return match op.op_kind(0) {
                K::r16_opcode | K::r32_opcode | K::r64_opcode => Class::PushReg,
                _ if op.op_kind(0) != K::None && matches!(kind(0), Some(OpKind::Register)) => {
                    Class::Interpret
                }
                _ if is_mem(0) => Class::Interpret,
                _ => Class::PushImm,
            };
        }
        M::Pop => {
            return match op.op_kind(0) {
                K::r16_opcode | K::r32_opcode | K::r64_opcode => Class::PopReg,
                _ => Class::Interpret,
            };
        }
        M::Mov => {
            let special = |k: K| matches!(k, K::seg_reg | K::cr_reg | K::dr_reg | K::tr_reg);
            if special(op.op_kind(0)) || special(op.op_kind(1)) {
                return Class::Interpret;
            }
        }
        // A register bit offset reaches beyond the operand.
        M::Bt | M::Bts | M::Btr | M::Btc if is_mem(0) && kind(1) == Some(OpKind::Register) => {
            return Class::Interpret;
        }
        _ => {}
    }
    if insn.is_privileged() || insn.has_rep_prefix() && insn.is_string_instruction() {
        return Class::Interpret;
    }
    Class::Native
}

fn unit(insn: &Instruction) -> Unit {
    let op = insn.code().op_code();
    match op.encoding() {
        EncodingKind::VEX => {
            let integer = insn.cpuid_features().iter().all(|f| {
                matches!(f, CpuidFeature::BMI1 | CpuidFeature::BMI2 | CpuidFeature::LZCNT | CpuidFeature::TBM)
            });
            let masks = insn.cpuid_features().iter().any(|f| {
                matches!(f, CpuidFeature::AVX512F | CpuidFeature::AVX512BW | CpuidFeature::AVX512DQ)
            });
            return if integer {
                Unit::Integer
            } else if masks {
                Unit::Evex
            } else {
                Unit::Avx
            };
        }
        EncodingKind::EVEX => return Unit::Evex,
        _ => {}
    }
    let mut unit = Unit::Integer;
    for feature in insn.cpuid_features() {
        match feature {
            CpuidFeature::FPU
            | CpuidFeature::FPU287
            | CpuidFeature::FPU287XL_ONLY
            | CpuidFeature::FPU387
            | CpuidFeature::MMX => {
                unit = Unit::X87;
            }
            CpuidFeature::SSE
            | CpuidFeature::SSE2
            | CpuidFeature::SSE3
            | CpuidFeature::SSSE3
            | CpuidFeature::SSE4_1
            | CpuidFeature::SSE4_2
            | CpuidFeature::SSE4A
            | CpuidFeature::AES
            | CpuidFeature::PCLMULQDQ
            | CpuidFeature::SHA
            | CpuidFeature::GFNI => unit = Unit::Sse,
            _ => {}
        }
    }
    // Fences, MOVNTI, CRC32, POPCNT and PREFETCH carry SSE feature bits but no vector state.
    if matches!(
        insn.mnemonic(),
        M::Lfence | M::Mfence | M::Sfence | M::Movnti | M::Crc32 | M::Popcnt | M::Pause | M::Clflush
    ) {
        unit = Unit::Integer;
    }
    unit
}

impl CodeInfo {
    fn of(insn: &Instruction) -> CodeInfo {
        let op = insn.code().op_code();
        let mut factory = InstructionInfoFactory::new();
        let info = factory.info(insn);
        let mut out = CodeInfo { class: classify(insn), unit: unit(insn), ..CodeInfo::default() };
        let mut used = 0;
        for n in 0..insn.op_count() {
            let access = info.op_access(n);
            let written = !matches!(
                access,
                OpAccess::None | OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess
            );
            let (field, byte) = match op.op_kind(n) {
                K::r8_reg => (Field::Reg, true),
                K::r16_reg | K::r16_reg_mem | K::r32_reg | K::r32_reg_mem | K::r64_reg | K::r64_reg_mem => {
                    (Field::Reg, false)
                }
                K::r8_or_mem => (Field::Rm, true),
                K::r16_or_mem
                | K::r32_or_mem
                | K::r32_or_mem_mpx
                | K::r64_or_mem
                | K::r64_or_mem_mpx
                | K::r16_rm
                | K::r32_rm
                | K::r64_rm => (Field::Rm, false),
                K::r8_opcode => (Field::Opcode, true),
                K::r16_opcode | K::r32_opcode | K::r64_opcode => (Field::Opcode, false),
                K::r32_vvvv | K::r64_vvvv => (Field::Vvvv, false),
                _ => (Field::None, false),
            };
            if field != Field::None && used < 4 {
                out.gprs[used] = GprOperand { field, byte, written };
                used += 1;
            }
            if insn.op_kind(n) == OpKind::Memory {
                out.mem_write |= written;
                out.mem_read |= !matches!(
                    access,
                    OpAccess::None | OpAccess::Write | OpAccess::CondWrite | OpAccess::NoMemAccess
                );
            }
        }
        out.wide =
            (0..insn.op_count()).any(|n| insn.op_kind(n) == OpKind::Register && insn.op_register(n).is_zmm());
        let m = insn.mnemonic();
        let plain = insn.cpuid_features().iter().all(|f| {
            use CpuidFeature as F;
            matches!(
                f,
                F::INTEL8086 | F::INTEL186 | F::INTEL286 | F::INTEL386 | F::INTEL486 | F::X64 | F::CMOV
            )
        });
        // An instruction of a later extension may be unknown to the host.
        out.may_fault = !plain || matches!(m, M::Div | M::Idiv | M::Cmpxchg16b | M::Wait);
        // Only when the first operand is a general register of 32 or 64 bits.
        out.first_write_only = insn.op_count() > 0
            && matches!(
                m,
                M::Mov | M::Movzx | M::Movsx | M::Movsxd | M::Movd | M::Movq | M::Rdrand | M::Rdseed
            )
            && matches!(
                op.op_kind(0),
                K::r32_reg
                    | K::r64_reg
                    | K::r32_opcode
                    | K::r64_opcode
                    | K::r32_or_mem
                    | K::r64_or_mem
                    | K::r32_rm
                    | K::r64_rm
            );
        out.by_cl = matches!(
            m,
            M::Shl | M::Shr | M::Sar | M::Sal | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
        ) && (0..insn.op_count()).any(|n| op.op_kind(n) == K::cl);
        out.wants_66 = op.mandatory_prefix() == MandatoryPrefix::P66 || op.operand_size() == 16;
        out
    }
}

/// The table of attributes, filled as codes are met. Codes with register and memory forms have two entries.
pub struct CodeTable {
    entries: Vec<CodeInfo>,
}

impl CodeTable {
    pub fn new() -> CodeTable {
        let codes = Code::values().len();
        CodeTable { entries: vec![CodeInfo::default(); codes * 2] }
    }
    /// Attributes of `insn`.
    #[inline]
    pub fn get(&mut self, insn: &Instruction) -> CodeInfo {
        let memory = insn.op0_kind() == OpKind::Memory
            || insn.op1_kind() == OpKind::Memory
            || insn.op2_kind() == OpKind::Memory;
        let slot = &mut self.entries[insn.code() as usize * 2 + usize::from(memory)];
        if slot.class == Class::Unknown {
            *slot = CodeInfo::of(insn);
        }
        *slot
    }
}

/// The raw parts of an instruction.
#[derive(Clone, Copy, Debug, Default)]
pub struct Raw {
    pub p66: bool,
    /// 0, F2h or F3h.
    pub rep: u8,
    pub lock: bool,
    /// REX bits W R X B as 8 4 2 1 (also from VEX).
    pub rex: u8,
    pub has_rex: bool,
    /// VEX: pp, L, vvvv; legacy: none.
    pub vex: Option<(u8, u8, u8)>,
    /// The three payload bytes of an EVEX prefix.
    pub evex: Option<[u8; 3]>,
    /// Opcode map: 0 one-byte, 1 0F, 2 0F38, 3 0F3A.
    pub map: u8,
    pub opcode: u8,
    pub modrm: Option<u8>,
    /// Where the immediate starts.
    pub imm: usize,
}

fn has_modrm(map: u8, op: u8, vex: bool) -> bool {
    match map {
        0 => match op {
            0x00..=0x3f => op & 7 < 4,
            0x62
            | 0x63
            | 0x69
            | 0x6b
            | 0x80..=0x8f
            | 0xc0
            | 0xc1
            | 0xc4..=0xc7
            | 0xd0..=0xd3
            | 0xd8..=0xdf
            | 0xf6
            | 0xf7
            | 0xfe
            | 0xff => true,
            _ => false,
        },
        1 if vex => op != 0x77,
        1 => !matches!(
            op,
            0x04..=0x0c | 0x0e | 0x30..=0x37 | 0x77 | 0x80..=0x8f | 0xa0..=0xa2 | 0xa8..=0xaa | 0xc8..=0xcf
        ),
        _ => true,
    }
}

impl Raw {
    /// Takes apart the instruction that is `bytes`; `address16`: its memory operand has 16-bit addressing.
    pub fn parse(bytes: &[u8], code64: bool, address16: bool) -> Raw {
        let mut raw = Raw::default();
        let at = |n: usize| bytes.get(n).copied().unwrap_or(0);
        let mut n = 0;
        loop {
            match at(n) {
                0x66 => raw.p66 = true,
                0xf2 | 0xf3 => raw.rep = at(n),
                0xf0 => raw.lock = true,
                0x67 | 0x2e | 0x36 | 0x3e | 0x26 | 0x64 | 0x65 => {}
                _ => break,
            }
            n += 1;
        }
        if code64 && at(n) & 0xf0 == 0x40 {
            raw.rex = at(n) & 15;
            raw.has_rex = true;
            n += 1;
        }
        let vex = |b: u8| code64 || b & 0xc0 == 0xc0;
        match at(n) {
            0xc5 if vex(at(n + 1)) => {
                let p = at(n + 1);
                raw.rex = (!p >> 7 & 1) << 2;
                raw.vex = Some((p & 3, p >> 2 & 1, !p >> 3 & 15));
                raw.map = 1;
                raw.opcode = at(n + 2);
                n += 3;
            }
            0xc4 if vex(at(n + 1)) => {
                let (p, q) = (at(n + 1), at(n + 2));
                raw.rex = (!p >> 5 & 7) | (q >> 7) << 3;
                raw.vex = Some((q & 3, q >> 2 & 1, !q >> 3 & 15));
                raw.map = p & 31;
                raw.opcode = at(n + 3);
                n += 4;
            }
            0x62 if vex(at(n + 1)) => {
                let payload = [at(n + 1), at(n + 2), at(n + 3)];
                raw.rex = (!payload[0] >> 5 & 7) | (payload[1] >> 7) << 3;
                raw.evex = Some(payload);
                raw.map = payload[0] & 7;
                raw.opcode = at(n + 4);
                n += 5;
            }
            0x0f => match at(n + 1) {
                0x38 => (raw.map, raw.opcode, n) = (2, at(n + 2), n + 3),
                0x3a => (raw.map, raw.opcode, n) = (3, at(n + 2), n + 3),
                op => (raw.map, raw.opcode, n) = (1, op, n + 2),
            },
            op => (raw.opcode, n) = (op, n + 1),
        }
        if !code64 && (raw.vex.is_some() || raw.evex.is_some()) {
            raw.rex &= 8;
            raw.vex = raw.vex.map(|(pp, l, v)| (pp, l, v & 7));
        }
        if raw.evex.is_some() || has_modrm(raw.map, raw.opcode, raw.vex.is_some()) {
            let modrm = at(n);
            raw.modrm = Some(modrm);
            n += 1;
            let (mode, rm) = (modrm >> 6, modrm & 7);
            if mode != 3 {
                if address16 {
                    n += match (mode, rm) {
                        (0, 6) | (2, _) => 2,
                        (1, _) => 1,
                        _ => 0,
                    };
                } else {
                    let mut base = rm;
                    if rm == 4 {
                        base = at(n) & 7;
                        n += 1;
                    }
                    n += match (mode, base) {
                        (0, 5) | (2, _) => 4,
                        (1, _) => 1,
                        _ => 0,
                    };
                }
            }
        }
        raw.imm = n.min(bytes.len());
        raw
    }

    /// Register number in a field, REX bit included.
    pub fn field(&self, field: Field) -> u8 {
        let modrm = self.modrm.unwrap_or(0);
        match field {
            Field::Reg => modrm >> 3 & 7 | (self.rex & 4) << 1,
            Field::Rm => modrm & 7 | (self.rex & 1) << 3,
            Field::Opcode => self.opcode & 7 | (self.rex & 1) << 3,
            Field::Vvvv => self.vex.map_or(0, |v| v.2),
            Field::None => 0,
        }
    }
}
