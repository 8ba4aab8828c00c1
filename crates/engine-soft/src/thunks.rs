//! The few routines at the start of code memory that lead into, out of and around translated code.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use wardian_cpu::EngineError;

use crate::access::{Site, Slow};
use crate::code::CodeMemory;
use crate::core::Core;
use crate::ctx::{Ctx, LEAVES, RBP_BIAS, disp};
use crate::sys::straight;

/// Offsets of the thunks in code memory.
#[derive(Clone, Copy, Debug, Default)]
pub struct Thunks {
    /// `extern "C" fn(rbp, code)`: runs translated code until it leaves.
    pub enter: u32,
    /// Where a slow access calls: R13 = address, R14 = [`Site`]; returns with R13 and R14 set, past the caller's next
    /// five bytes if the write must be committed.
    pub slow: u32,
    /// Where a committed write calls after its instruction; returns past the next five bytes if translated code
    /// must be left. Keeps all registers and flags.
    pub commit: u32,
    /// Where a block calls that needs vector registers 16-31 or the mask registers and finds them not live. Clobbers
    /// flags.
    pub load_high: u32,
    /// Where a block ends with an instruction that is run straight: R14 = its number. See [`straight`].
    pub straight: u32,
    /// Leave, by reason: R13 = rip, R14 = argument.
    pub leave: [u32; LEAVES],
    /// First free offset.
    pub end: u32,
}

extern "C" fn slow_helper(ctx: *mut Ctx, address: u64, site: u64) -> u32 {
    // SAFETY: translated code runs only inside `Core`'s run loop, which put its own address there and does not
    // touch the core until translated code has left.
    let core = unsafe { &mut *((*ctx).core as *mut Core) };
    let site = Site(site).settled(&core.ctx);
    core.slow_access(address, site) as u32
}

extern "C" fn commit_helper(ctx: *mut Ctx) -> u32 {
    // SAFETY: as in `slow_helper`.
    let core = unsafe { &mut *((*ctx).core as *mut Core) };
    u32::from(core.finish_write())
}

macro_rules! field {
    ($name:ident) => {
        rbp + disp(std::mem::offset_of!(Ctx, $name))
    };
}

fn gpr(n: usize) -> AsmMemoryOperand {
    qword_ptr(rbp + disp(std::mem::offset_of!(Ctx, gpr) + n * 8))
}

/// (guest register number, host register) of all that live in host registers.
const LIVE: [(usize, AsmRegister64); 12] = [
    (0, rax),
    (1, rcx),
    (2, rdx),
    (3, rbx),
    (4, r15),
    (5, r12),
    (6, rsi),
    (7, rdi),
    (8, r8),
    (9, r9),
    (10, r10),
    (11, r11),
];

fn save_gprs(a: &mut CodeAssembler) -> Result<(), IcedError> {
    for (n, r) in LIVE {
        a.mov(gpr(n), r)?;
    }
    Ok(())
}

fn load_gprs(a: &mut CodeAssembler) -> Result<(), IcedError> {
    for (n, r) in LIVE {
        a.mov(r, gpr(n))?;
    }
    Ok(())
}

const XMM: [AsmRegisterXmm; 16] =
    [xmm0, xmm1, xmm2, xmm3, xmm4, xmm5, xmm6, xmm7, xmm8, xmm9, xmm10, xmm11, xmm12, xmm13, xmm14, xmm15];
const YMM: [AsmRegisterYmm; 16] =
    [ymm0, ymm1, ymm2, ymm3, ymm4, ymm5, ymm6, ymm7, ymm8, ymm9, ymm10, ymm11, ymm12, ymm13, ymm14, ymm15];
const YMM_HIGH: [AsmRegisterYmm; 16] = [
    ymm16, ymm17, ymm18, ymm19, ymm20, ymm21, ymm22, ymm23, ymm24, ymm25, ymm26, ymm27, ymm28, ymm29, ymm30,
    ymm31,
];
const ZMM: [AsmRegisterZmm; 32] = [
    zmm0, zmm1, zmm2, zmm3, zmm4, zmm5, zmm6, zmm7, zmm8, zmm9, zmm10, zmm11, zmm12, zmm13, zmm14, zmm15,
    zmm16, zmm17, zmm18, zmm19, zmm20, zmm21, zmm22, zmm23, zmm24, zmm25, zmm26, zmm27, zmm28, zmm29, zmm30,
    zmm31,
];
const MASK: [AsmRegisterK; 8] = [k0, k1, k2, k3, k4, k5, k6, k7];

/// Saves or restores vector registers 0-15 as `vec_mode` says. Clobbers flags.
fn vectors(a: &mut CodeAssembler, save: bool) -> Result<(), IcedError> {
    let at = |n: usize| rbp + disp(std::mem::offset_of!(Ctx, vec) + n * 64);
    let (mut wide, mut widest, mut done) = (a.create_label(), a.create_label(), a.create_label());
    a.cmp(dword_ptr(field!(vec_mode)), 1)?;
    a.je(wide)?;
    a.ja(widest)?;
    for (n, r) in XMM.into_iter().enumerate() {
        if save { a.movups(xmmword_ptr(at(n)), r)? } else { a.movups(r, xmmword_ptr(at(n)))? }
    }
    a.jmp(done)?;
    a.set_label(&mut wide)?;
    for (n, r) in YMM.into_iter().enumerate() {
        if save { a.vmovups(ymmword_ptr(at(n)), r)? } else { a.vmovups(r, ymmword_ptr(at(n)))? }
    }
    if save {
        a.vzeroupper()?;
    }
    a.jmp(done)?;
    a.set_label(&mut widest)?;
    for (n, r) in ZMM.into_iter().enumerate().take(16) {
        if save { a.vmovups(zmmword_ptr(at(n)), r)? } else { a.vmovups(r, zmmword_ptr(at(n)))? }
    }
    if save {
        a.vzeroupper()?;
    }
    a.set_label(&mut done)?;
    Ok(())
}

/// Saves vector registers 16-31 and the mask registers if they are live, or loads them in any case; says which in
/// `high_live`. Clobbers flags.
fn high_vectors(a: &mut CodeAssembler, save: bool) -> Result<(), IcedError> {
    let at = |n: usize| rbp + disp(std::mem::offset_of!(Ctx, vec) + n * 64);
    let (mut widest, mut masks, mut done) = (a.create_label(), a.create_label(), a.create_label());
    if save {
        a.cmp(dword_ptr(field!(high_live)), 0)?;
        a.je(done)?;
    }
    a.mov(dword_ptr(field!(high_live)), u32::from(!save))?;
    a.cmp(dword_ptr(field!(vec_mode)), 1)?;
    a.ja(widest)?;
    for (n, r) in YMM_HIGH.into_iter().enumerate() {
        let m = ymmword_ptr(at(n + 16));
        if save { a.vmovdqu64(m, r)? } else { a.vmovdqu64(r, m)? }
    }
    a.jmp(masks)?;
    a.set_label(&mut widest)?;
    for (n, r) in ZMM.into_iter().enumerate().skip(16) {
        let m = zmmword_ptr(at(n));
        if save { a.vmovups(m, r)? } else { a.vmovups(r, m)? }
    }
    a.set_label(&mut masks)?;
    for (n, k) in MASK.into_iter().enumerate() {
        let m = qword_ptr(rbp + disp(std::mem::offset_of!(Ctx, mask) + n * 8));
        if save { a.kmovq(m, k)? } else { a.kmovq(k, m)? }
    }
    a.set_label(&mut done)?;
    a.zero_bytes()
}

/// After a helper: loads what [`high_vectors`] saved if EBX says that it was live. Clobbers flags.
fn high_again(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut done = a.create_label();
    a.test(ebx, ebx)?;
    a.je(done)?;
    high_vectors(a, false)?;
    a.set_label(&mut done)?;
    a.zero_bytes()
}

fn build(
    code: &mut CodeMemory,
    at: u32,
    f: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<u32, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    f(&mut a)?;
    let bytes = a.assemble(code.exec(at))?;
    for (n, chunk) in bytes.chunks(16).enumerate() {
        code.put(at + n as u32 * 16, chunk);
    }
    Ok((at + bytes.len() as u32 + 63) & !63)
}

/// Writes the thunks to the start of `code`.
pub fn write(code: &mut CodeMemory) -> Result<Thunks, EngineError> {
    write_all(code).map_err(|e| EngineError::Host(format!("the thunks do not assemble: {e}")))
}

fn write_all(code: &mut CodeMemory) -> Result<Thunks, IcedError> {
    let mut t = Thunks { enter: 64, ..Thunks::default() };
    // enter(rdi = rbp value, rsi = code)
    let mut at = build(code, t.enter, |a| {
        for r in [rbx, rbp, r12, r13, r14, r15] {
            a.push(r)?;
        }
        a.sub(rsp, 8)?; // translated code runs with RSP a multiple of 16
        a.mov(rbp, rdi)?;
        a.mov(qword_ptr(field!(host_rsp)), rsp)?;
        a.mov(qword_ptr(field!(ret)), rsi)?;
        vectors(a, false)?;
        load_gprs(a)?;
        a.jmp(qword_ptr(field!(ret)))
    })?;
    // The common tail of leaving: everything of the guest is in the context.
    let tail = at;
    at = build(code, at, |a| {
        a.mov(rsp, qword_ptr(field!(host_rsp)))?;
        a.add(rsp, 8)?;
        for r in [r15, r14, r13, r12, rbp, rbx] {
            a.pop(r)?;
        }
        a.ret()
    })?;
    let common = at;
    let tail_address = code.exec(tail);
    at = build(code, at, |a| {
        a.mov(qword_ptr(field!(rip)), r13)?;
        a.mov(dword_ptr(field!(arg)), r14d)?;
        save_gprs(a)?;
        vectors(a, true)?;
        high_vectors(a, true)?;
        a.jmp(tail_address)
    })?;
    let common_address = code.exec(common);
    for (n, leave) in t.leave.iter_mut().enumerate() {
        *leave = at;
        at = build(code, at, |a| {
            a.mov(dword_ptr(field!(leave)), n as u32)?;
            a.jmp(common_address)
        })?;
    }
    t.slow = at;
    at = build(code, at, |a| {
        let (mut leave, mut commit, mut out) = (a.create_label(), a.create_label(), a.create_label());
        save_gprs(a)?;
        a.mov(ebx, dword_ptr(field!(high_live)))?;
        vectors(a, true)?;
        high_vectors(a, true)?;
        a.lea(rdi, qword_ptr(rbp - RBP_BIAS))?;
        a.mov(rsi, r13)?;
        a.mov(rdx, r14)?;
        a.sub(rsp, 8)?;
        a.mov(rax, slow_helper as *const () as u64)?;
        a.call(rax)?;
        a.add(rsp, 8)?;
        a.mov(r14d, eax)?;
        vectors(a, false)?;
        a.cmp(r14d, Slow::Commit as u32)?;
        a.ja(leave)?;
        high_again(a)?;
        a.cmp(r14d, Slow::Commit as u32)?;
        a.je(commit)?;
        load_gprs(a)?;
        a.mov(r13, qword_ptr(field!(ret)))?;
        a.mov(r14, qword_ptr(rbp + disp(std::mem::offset_of!(Ctx, ret) + 8)))?;
        a.ret()?;
        a.set_label(&mut commit)?;
        load_gprs(a)?;
        a.mov(r13, qword_ptr(field!(ret)))?;
        a.mov(r14, qword_ptr(rbp + disp(std::mem::offset_of!(Ctx, ret) + 8)))?;
        a.add(qword_ptr(rsp), 5)?;
        a.ret()?;
        a.set_label(&mut leave)?;
        // The vectors are in the context as well as in the registers. (An exception whose delivery was the instruction's
        // end goes on straight; vector registers 16-31 stay in the context until a block needs them.)
        a.cmp(r14d, Slow::Leave as u32)?;
        a.je(out)?;
        a.mov(rsp, qword_ptr(field!(host_rsp)))?;
        load_gprs(a)?;
        a.mov(r13, qword_ptr(field!(rip)))?;
        a.jmp(qword_ptr(field!(ret)))?;
        a.set_label(&mut out)?;
        a.jmp(tail_address)
    })?;
    t.commit = at;
    at = build(code, at, |a| {
        let mut stay = a.create_label();
        a.pushfq()?;
        save_gprs(a)?;
        a.mov(ebx, dword_ptr(field!(high_live)))?;
        vectors(a, true)?;
        high_vectors(a, true)?;
        a.lea(rdi, qword_ptr(rbp - RBP_BIAS))?;
        a.mov(rax, commit_helper as *const () as u64)?;
        a.call(rax)?;
        a.mov(r14d, eax)?;
        vectors(a, false)?;
        high_again(a)?;
        a.test(r14d, r14d)?;
        a.je(stay)?;
        a.add(qword_ptr(rsp + 8), 5)?;
        a.set_label(&mut stay)?;
        load_gprs(a)?;
        a.popfq()?;
        a.ret()
    })?;
    t.straight = at;
    at = build(code, at, |a| {
        let mut leave = a.create_label();
        save_gprs(a)?;
        vectors(a, true)?;
        high_vectors(a, true)?;
        a.lea(rdi, qword_ptr(rbp - RBP_BIAS))?;
        a.mov(esi, r14d)?;
        a.mov(rax, straight::helper as *const () as u64)?;
        a.call(rax)?;
        // The address space may be another now.
        a.mov(rbp, qword_ptr(field!(rbp)))?;
        a.test(rax, rax)?;
        a.je(leave)?;
        a.mov(r14, rax)?;
        // Vector registers 16-31 stay in the context until a block needs them.
        vectors(a, false)?;
        load_gprs(a)?;
        a.mov(r13, qword_ptr(field!(rip)))?;
        a.jmp(r14)?;
        a.set_label(&mut leave)?;
        a.jmp(tail_address)
    })?;
    t.load_high = at;
    at = build(code, at, |a| {
        high_vectors(a, false)?;
        a.ret()
    })?;
    t.end = at;
    Ok(t)
}
