//! Instructions that translated code does not run itself: privileged, mode-dependent and odd ones.
//!
//! [`interpret`] runs one of them on the architectural state of a [`Core`]. The pseudo-code, the order of the
//! checks and the error codes are those of the Intel SDM vol. 2 (AMD APM vol. 3 where the model's vendor
//! differs).

pub(crate) mod bits;
pub(crate) mod control;
pub(crate) mod cpuid;
pub(crate) mod deliver;
pub(crate) mod descriptor;
pub(crate) mod evex_ops;
pub(crate) mod fpu_ops;
pub(crate) mod io;
pub(crate) mod legacy;
pub(crate) mod msr;
pub(crate) mod paravirt;
pub(crate) mod stack;
pub(crate) mod straight;
pub(crate) mod string;
pub(crate) mod task;
pub(crate) mod transfer;
pub(crate) mod vector_ops;

#[cfg(test)]
mod tests;

use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use wardian_cpu::bits::rflags;

use crate::core::{Core, Privilege, seg};
use crate::trap::{Result, Trap};

pub(crate) use deliver::{Event, deliver};

/// Runs `insn` at `core.rip()`.
///
/// # Errors
/// The exception or the question to the machine that stopped it; then nothing of it is committed (but the
/// finished iterations of a string instruction, and the state of a new task).
pub(crate) fn interpret(core: &mut Core, insn: &Instruction) -> Result<()> {
    let shadow = core.sys.interrupt_shadow;
    handler(insn)(core, insn)?;
    if shadow {
        core.sys.interrupt_shadow = false;
    }
    Ok(())
}

/// What runs one instruction.
pub(crate) type Handler = fn(&mut Core, &Instruction) -> Result<()>;

/// What runs `insn`, to be called with an instruction like it.
pub(crate) fn handler(insn: &Instruction) -> Handler {
    use Mnemonic as M;
    match insn.mnemonic() {
        M::Syscall => |core, insn| transfer::syscall(core, insn.next_ip()),
        M::Sysret | M::Sysretq => |core, insn| transfer::sysret(core, insn.mnemonic() == M::Sysretq),
        M::Iret => |core, insn| transfer::iret(core, insn.next_ip(), 2),
        M::Iretd => |core, insn| transfer::iret(core, insn.next_ip(), 4),
        M::Iretq => |core, insn| transfer::iret(core, insn.next_ip(), 8),
        M::Swapgs => descriptor::swapgs,
        M::Cli => control::cli,
        M::Sti => control::sti,
        M::Pushf => |core, insn| control::pushf(core, insn, 2),
        M::Pushfd => |core, insn| control::pushf(core, insn, 4),
        M::Pushfq => |core, insn| control::pushf(core, insn, 8),
        M::Popf => |core, insn| control::popf(core, insn, 2),
        M::Popfd => |core, insn| control::popf(core, insn, 4),
        M::Popfq => |core, insn| control::popf(core, insn, 8),
        M::Clac => |core, insn| control::alignment_flag(core, insn, false),
        M::Stac => |core, insn| control::alignment_flag(core, insn, true),
        M::Cld => |core, insn| control::direction_flag(core, insn, false),
        M::Std => |core, insn| control::direction_flag(core, insn, true),
        M::Mov => match mov_kind(insn) {
            MovKind::ToSegment => descriptor::mov_to_segment,
            MovKind::FromSegment => descriptor::mov_from_segment,
            MovKind::Control => control::mov_control,
            MovKind::Debug => control::mov_debug,
            MovKind::Other => other,
        },
        M::Wrmsr => msr::wrmsr,
        M::Rdmsr => msr::rdmsr,
        M::Rdtsc => control::rdtsc,
        M::Rdtscp => control::rdtscp,
        M::Rdpid => control::rdpid,
        M::Rdpmc => |core, _| control::rdpmc(core),
        M::Cpuid => cpuid::cpuid,
        M::Invlpg => control::invlpg,
        M::Invpcid => control::invpcid,
        M::Hlt => control::hlt,
        M::Clts => control::clts,
        M::Lmsw => control::lmsw,
        M::Smsw => control::smsw,
        M::Xsetbv => control::xsetbv,
        M::Xgetbv => control::xgetbv,
        M::Wbinvd | M::Invd | M::Wbnoinvd => control::cache_flush,
        M::Clflush | M::Clflushopt | M::Clwb | M::Cldemote => control::cache_line,
        M::Serialize => control::serialize,
        M::Vmcall | M::Vmmcall => control::hypercall,
        M::Rdfsbase => |core, insn| descriptor::read_base(core, insn, seg::FS),
        M::Rdgsbase => |core, insn| descriptor::read_base(core, insn, seg::GS),
        M::Wrfsbase => |core, insn| descriptor::write_base(core, insn, seg::FS),
        M::Wrgsbase => |core, insn| descriptor::write_base(core, insn, seg::GS),
        M::Push if insn.op0_kind() == OpKind::Register && insn.op0_register().is_segment_register() => {
            descriptor::push_segment
        }
        M::Pop if insn.op0_kind() == OpKind::Register && insn.op0_register().is_segment_register() => {
            descriptor::pop_segment
        }
        M::Lds => |core, insn| descriptor::load_far(core, insn, seg::DS),
        M::Les => |core, insn| descriptor::load_far(core, insn, seg::ES),
        M::Lss => |core, insn| descriptor::load_far(core, insn, seg::SS),
        M::Lfs => |core, insn| descriptor::load_far(core, insn, seg::FS),
        M::Lgs => |core, insn| descriptor::load_far(core, insn, seg::GS),
        M::Lldt => descriptor::lldt,
        M::Ltr => descriptor::ltr,
        M::Sldt => |core, insn| {
            let selector = core.sys.ldtr.selector;
            descriptor::store_selector(core, insn, selector)
        },
        M::Str => |core, insn| {
            let selector = core.sys.tr.selector;
            descriptor::store_selector(core, insn, selector)
        },
        M::Lar => descriptor::lar,
        M::Lsl => descriptor::lsl,
        M::Verr => |core, insn| descriptor::verify(core, insn, false),
        M::Verw => |core, insn| descriptor::verify(core, insn, true),
        M::Arpl => descriptor::arpl,
        M::Sgdt => |core, insn| {
            let table = core.sys.gdtr;
            descriptor::store_table(core, insn, table)
        },
        M::Sidt => |core, insn| {
            let table = core.sys.idtr;
            descriptor::store_table(core, insn, table)
        },
        M::Lgdt => |core, insn| descriptor::load_table(core, insn, true),
        M::Lidt => |core, insn| descriptor::load_table(core, insn, false),
        M::Jmp if is_far(insn) => transfer::jmp_far,
        M::Call if is_far(insn) => transfer::call_far,
        M::Retf => transfer::retf,
        M::Int => |core, insn| transfer::int_n(core, insn, insn.immediate8()),
        M::Int1 => transfer::int1,
        M::Int3 => transfer::int3,
        M::Into => transfer::into,
        M::Movsb
        | M::Movsw
        | M::Movsd
        | M::Movsq
        | M::Stosb
        | M::Stosw
        | M::Stosd
        | M::Stosq
        | M::Scasb
        | M::Cmpsb => |core, insn| string::interpret(core, insn).unwrap_or_else(|| other(core, insn)),
        M::Xsave | M::Xsave64 | M::Xsavec | M::Xsavec64 | M::Xrstor | M::Xrstor64 => {
            |core, insn| fpu_ops::interpret(core, insn).unwrap_or_else(|| other(core, insn))
        }
        M::Sysenter => |core, _| transfer::sysenter(core),
        M::Sysexit | M::Sysexitq => |core, insn| transfer::sysexit(core, insn.mnemonic() == M::Sysexitq),
        _ => other,
    }
}

/// The other half of the helpers; what nobody knows is #UD (UD0-UD2, RSM, VMX, SVM, MONITOR and all else that
/// the model does not offer).
fn other(core: &mut Core, insn: &Instruction) -> Result<()> {
    io::interpret(core, insn)
        .or_else(|| string::interpret(core, insn))
        .or_else(|| fpu_ops::interpret(core, insn))
        .or_else(|| legacy::interpret(core, insn))
        .or_else(|| bits::interpret(core, insn))
        .or_else(|| vector_ops::interpret(core, insn))
        .or_else(|| evex_ops::interpret(core, insn))
        .unwrap_or_else(|| Err(Trap::ud()))
}

enum MovKind {
    ToSegment,
    FromSegment,
    Control,
    Debug,
    Other,
}

fn mov_kind(insn: &Instruction) -> MovKind {
    let (to, from) = (insn.op0_register(), insn.op1_register());
    if to.is_segment_register() {
        MovKind::ToSegment
    } else if from.is_segment_register() {
        MovKind::FromSegment
    } else if to.is_cr() || from.is_cr() {
        MovKind::Control
    } else if to.is_dr() || from.is_dr() {
        MovKind::Debug
    } else {
        MovKind::Other
    }
}

fn is_far(insn: &Instruction) -> bool {
    matches!(insn.op0_kind(), OpKind::FarBranch16 | OpKind::FarBranch32)
        || insn.is_jmp_far_indirect()
        || insn.is_call_far_indirect()
}

/// Moves RIP past `insn`, in the width of the code segment, and ends a resume from a breakpoint (EFLAGS.RF).
#[inline]
pub(crate) fn advance(core: &mut Core, insn: &Instruction) {
    let next = insn.next_ip();
    let next = if core.is_64bit() {
        next
    } else if core.sys.segments[seg::CS].big() {
        next & 0xffff_ffff
    } else {
        next & 0xffff
    };
    core.set_rip(next);
    clear_rf(core);
}

/// Clears EFLAGS.RF, as every instruction but those that load it does.
#[inline]
pub(crate) fn clear_rf(core: &mut Core) {
    if core.c().rflags & rflags::RF != 0 {
        core.ctx.get_mut().rflags &= !rflags::RF;
        core.mode_dirty = true;
    }
}

/// Sets or clears flags that neither the arithmetic slot nor the choice of translated code depends on.
#[inline]
pub(crate) fn plain_flag(core: &mut Core, flag: u64, value: bool) {
    let ctx = core.ctx.get_mut();
    if value { ctx.rflags |= flag } else { ctx.rflags &= !flag }
}

/// Sets ZF, leaving every other flag.
pub(crate) fn set_zf(core: &mut Core, value: bool) {
    let flags = core.rflags();
    core.set_rflags(if value { flags | rflags::ZF } else { flags & !rflags::ZF });
}

/// Value of a 16-, 32- or 64-bit general register, zero-extended.
pub(crate) fn register(core: &Core, register: Register) -> u64 {
    let value = core.gpr(register.number());
    match register.size() {
        2 => value & 0xffff,
        4 => value & 0xffff_ffff,
        _ => value,
    }
}

/// Writes a 16-, 32- or 64-bit general register as an instruction does: 32-bit writes clear the upper half.
pub(crate) fn set_register(core: &mut Core, register: Register, value: u64) {
    let number = register.number();
    let value = match register.size() {
        2 => (core.gpr(number) & !0xffff) | (value & 0xffff),
        4 => value & 0xffff_ffff,
        _ => value,
    };
    core.set_gpr(number, value);
}

/// The 16-bit value of register-or-memory operand `operand`.
pub(crate) fn word_operand(core: &mut Core, insn: &Instruction, operand: u32) -> Result<u16> {
    if insn.op_kind(operand) == OpKind::Register {
        return Ok(register(core, insn.op_register(operand)) as u16);
    }
    let at = core.operand_address(insn, 2, false)?;
    core.read_u16(at, Privilege::Current)
}

/// Stores into operand 0: 16 bits to memory, or a whole register.
pub(crate) fn store_word(core: &mut Core, insn: &Instruction, value: u64) -> Result<()> {
    if insn.op0_kind() == OpKind::Register {
        set_register(core, insn.op0_register(), value);
        return Ok(());
    }
    let at = core.operand_address(insn, 2, true)?;
    core.write_u16(at, value as u16, Privilege::Current)
}

/// #GP(0) unless at privilege level 0.
#[inline]
pub(crate) fn need_cpl0(core: &Core) -> Result<()> {
    if core.cpl() == 0 { Ok(()) } else { Err(Trap::gp(0)) }
}

/// #UD in real and virtual-8086 mode.
pub(crate) fn need_protected(core: &Core) -> Result<()> {
    if core.protected() && !core.v86() { Ok(()) } else { Err(Trap::ud()) }
}

/// Whether a linear address has the canonical form of 48 bits.
#[inline]
pub(crate) fn canonical(linear: u64) -> bool {
    ((linear << 16) as i64 >> 16) as u64 == linear
}
