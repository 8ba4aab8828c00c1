//! Saving and restoring x87, SSE and extended state: FXSAVE, FXRSTOR, XSAVE, XSAVEC, XSAVEOPT, XRSTOR, FNSAVE,
//! FRSTOR, FNSTENV, FLDENV, LDMXCSR, STMXCSR.
//!
//! They work on the guest's image in the context ([`crate::fpu`]). The last instruction and data pointers are
//! always zero: the host's are addresses of the code cache. Source: Intel SDM vol. 1, 8.1.8-8.1.10, 10.5, 13.

#[cfg(test)]
mod tests;

use iced_x86::{Code, Instruction};
use wardian_cpu::Feature;
use wardian_cpu::bits::{cr0, cr4, vector};

use super::advance;
use super::legacy::operand::{load, store};
use crate::core::{Core, Privilege};
use crate::fpu;
use crate::trap::{Result, Trap};

/// Offset of MXCSR in the legacy area.
const MXCSR: usize = 24;
/// Offset of the XSAVE header.
const HEADER: usize = 512;
/// Where components from 2 on begin.
const EXTENDED: usize = 576;
/// MXCSR after reset.
const MXCSR_INIT: u32 = 0x1f80;
const X87: u64 = 1;
const SSE: u64 = 2;
const AVX: u64 = 4;
/// Bits 256-511 of ZMM0-ZMM15.
const HI256: u64 = 0x40;
/// ZMM16-ZMM31.
const HI16: u64 = 0x80;
const COMPACT: u64 = 1 << 63;

fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}
fn dword(bytes: &[u8], at: usize) -> u32 {
    u32::from(word(bytes, at)) | u32::from(word(bytes, at + 2)) << 16
}
fn qword(bytes: &[u8], at: usize) -> u64 {
    u64::from(dword(bytes, at)) | u64::from(dword(bytes, at + 4)) << 32
}

/// The guest's state in the standard XSAVE format, components that are in their initial state written out.
struct Image([u8; 4096]);

impl Image {
    /// The state now.
    fn take(core: &mut Core) -> Image {
        fpu::store(core);
        let mut image = Image(core.c().xsave);
        let used = image.used();
        image.0[6..MXCSR].fill(0);
        if used & X87 == 0 {
            image.reset_x87();
        }
        if used & SSE == 0 {
            image.0[160..416].fill(0);
        }
        for number in components(core.sys.xcr0 & !used) {
            let (at, len) = standard(core, number);
            image.0[at..at + len].fill(0);
        }
        image
    }

    /// Makes it the guest's state.
    fn put(&self, core: &mut Core) {
        let target = &mut core.ctx.get_mut().xsave;
        target.copy_from_slice(&self.0);
        target[6..MXCSR].fill(0);
        target[HEADER + 8..EXTENDED].fill(0);
        fpu::load(core);
    }

    /// Components not in their initial state (XSTATE_BV).
    fn used(&self) -> u64 {
        qword(&self.0, HEADER)
    }

    fn set_used(&mut self, used: u64) {
        self.0[HEADER..HEADER + 8].copy_from_slice(&used.to_le_bytes());
    }

    fn reset_x87(&mut self) {
        self.0[..MXCSR].fill(0);
        self.0[..2].copy_from_slice(&0x37fu16.to_le_bytes());
        self.0[32..160].fill(0);
    }

    fn mxcsr(&self) -> u32 {
        dword(&self.0, MXCSR)
    }

    fn set_mxcsr(&mut self, value: u32) {
        self.0[MXCSR..MXCSR + 4].copy_from_slice(&value.to_le_bytes());
    }

    /// #GP(0) if `value` has bits that MXCSR has not.
    fn check_mxcsr(&self, value: u32) -> Result<()> {
        let mask = match dword(&self.0, MXCSR + 4) {
            0 => 0xffbf,
            mask => mask,
        };
        if value & !mask == 0 { Ok(()) } else { Err(Trap::gp(0)) }
    }

    fn top(&self) -> usize {
        usize::from(word(&self.0, 2) >> 11 & 7)
    }

    /// The full tag word (SDM vol. 1, 8.1.7) from the abridged one and the registers.
    fn tags(&self) -> u16 {
        let mut tags = 0;
        for physical in 0..8 {
            let register = 32 + 16 * ((physical + 8 - self.top()) & 7);
            let exponent = word(&self.0, register + 8) & 0x7fff;
            let mantissa = qword(&self.0, register);
            let tag = if self.0[4] >> physical & 1 == 0 {
                3
            } else if exponent == 0 && mantissa == 0 {
                1
            } else if exponent == 0 || exponent == 0x7fff || mantissa >> 63 == 0 {
                2
            } else {
                0
            };
            tags |= tag << (2 * physical);
        }
        tags
    }

    /// Loads control, status and full tag word; the error summary follows from the first two.
    fn set_environment(&mut self, control: u16, status: u16, tags: u16) {
        let control = control | 0x40;
        let pending = status & !control & 0x3f != 0;
        let status = (status & 0x7f7f) | if pending { 0x8080 } else { 0 };
        let abridged = (0..8).fold(0u8, |all, n| all | u8::from(tags >> (2 * n) & 3 != 3) << n);
        self.0[..2].copy_from_slice(&control.to_le_bytes());
        self.0[2..4].copy_from_slice(&status.to_le_bytes());
        self.0[4] = abridged;
    }
}

/// The component numbers from 2 on in `set`.
fn components(set: u64) -> impl Iterator<Item = u32> {
    (2..63).filter(move |number| set >> number & 1 != 0)
}

fn describe(core: &Core, number: u32) -> [u32; 4] {
    core.components.get(number as usize).copied().unwrap_or_default()
}

/// (offset, length) of component `number` in the standard format, within the image in any case.
fn standard(core: &Core, number: u32) -> (usize, usize) {
    let [len, offset, ..] = describe(core, number);
    let (len, offset) = (len as usize, offset as usize);
    if offset < EXTENDED || offset + len > 4096 { (EXTENDED, 0) } else { (offset, len) }
}

/// An extended component in both formats.
#[derive(Clone, Copy, Default)]
struct Place {
    number: u32,
    /// Offset in the compacted format.
    packed: usize,
    /// Offset in the standard format.
    offset: usize,
    len: usize,
}

impl Place {
    fn start(&self, compact: bool) -> usize {
        if compact { self.packed } else { self.offset }
    }
}

/// The places of the extended components of `set`, the compacted format being that of `set`; how many; where that
/// format ends.
fn places(core: &Core, set: u64) -> ([Place; 16], usize, usize) {
    let mut list = [Place::default(); 16];
    let (mut used, mut end) = (0, EXTENDED);
    for number in components(set).take(16) {
        let aligned = describe(core, number)[2] & 2 != 0;
        let (offset, len) = standard(core, number);
        let packed = if aligned { end.next_multiple_of(64) } else { end };
        list[used] = Place { number, packed, offset, len };
        used += 1;
        end = packed + len;
    }
    (list, used, end)
}

/// #NM for instructions that only CR0.TS stops.
fn not_switched(core: &Core) -> Result<()> {
    if core.sys.cr0 & cr0::TS != 0 { Err(Trap::nm()) } else { Ok(()) }
}

/// #NM for x87 instructions.
fn x87(core: &Core) -> Result<()> {
    if core.sys.cr0 & (cr0::TS | cr0::EM) != 0 { Err(Trap::nm()) } else { Ok(()) }
}

/// Registers of a kind that the mode has: 16 in 64-bit mode, 8 elsewhere.
fn registers(core: &Core) -> usize {
    if core.is_64bit() { 16 } else { 8 }
}

/// Runs `insn` if it is one of this module's.
pub(crate) fn interpret(core: &mut Core, insn: &Instruction) -> Option<Result<()>> {
    let done = match insn.code() {
        Code::Fxsave_m512byte | Code::Fxsave64_m512byte => fxsave(core, insn),
        Code::Fxrstor_m512byte | Code::Fxrstor64_m512byte => fxrstor(core, insn),
        Code::Xsave_mem | Code::Xsave64_mem => xsave(core, insn, false),
        // To write what has not changed as well is allowed.
        Code::Xsaveopt_mem | Code::Xsaveopt64_mem if core.model.has(Feature::Xsaveopt) => {
            xsave(core, insn, false)
        }
        Code::Xsavec_mem | Code::Xsavec64_mem => xsave(core, insn, true),
        Code::Xrstor_mem | Code::Xrstor64_mem => xrstor(core, insn),
        Code::Fnsave_m94byte => fnsave(core, insn, 2),
        Code::Fnsave_m108byte => fnsave(core, insn, 4),
        Code::Fnstenv_m14byte => fnstenv(core, insn, 2),
        Code::Fnstenv_m28byte => fnstenv(core, insn, 4),
        Code::Frstor_m94byte => frstor(core, insn, 2),
        Code::Frstor_m108byte => frstor(core, insn, 4),
        Code::Fldenv_m14byte => fldenv(core, insn, 2),
        Code::Fldenv_m28byte => fldenv(core, insn, 4),
        Code::Ldmxcsr_m32 | Code::VEX_Vldmxcsr_m32 => ldmxcsr(core, insn),
        Code::Stmxcsr_m32 | Code::VEX_Vstmxcsr_m32 => stmxcsr(core, insn),
        _ => return None,
    };
    Some(done.map(|()| advance(core, insn)))
}

/// Address of an FXSAVE area, 16-byte aligned.
fn fx_area(core: &mut Core, insn: &Instruction, write: bool) -> Result<u64> {
    x87(core)?;
    let linear = core.operand_address(insn, 512, write)?;
    if linear & 15 != 0 {
        return Err(Trap::gp(0));
    }
    Ok(linear)
}

/// Length of an FXSAVE image that is used: the XMM registers belong to it only with CR4.OSFXSR.
fn fx_len(core: &Core) -> usize {
    if core.sys.cr4 & cr4::OSFXSR == 0 { 160 } else { 160 + 16 * registers(core) }
}

fn fxsave(core: &mut Core, insn: &Instruction) -> Result<()> {
    let linear = fx_area(core, insn, true)?;
    core.probe_write(linear, 512, Privilege::Current)?;
    let image = Image::take(core);
    let len = fx_len(core);
    core.write(linear, &image.0[..len], Privilege::Current)
}

fn fxrstor(core: &mut Core, insn: &Instruction) -> Result<()> {
    let linear = fx_area(core, insn, false)?;
    let mut area = [0u8; 512];
    core.read(linear, &mut area, Privilege::Current)?;
    let mut image = Image::take(core);
    let len = fx_len(core);
    let sse = len > 160;
    if sse {
        image.check_mxcsr(dword(&area, MXCSR))?;
        image.0[160..len].copy_from_slice(&area[160..len]);
        image.set_mxcsr(dword(&area, MXCSR));
    }
    image.0[..MXCSR].copy_from_slice(&area[..MXCSR]);
    image.0[32..160].copy_from_slice(&area[32..160]);
    let used = image.used() | X87 | if sse { SSE } else { 0 };
    image.set_used(used);
    image.put(core);
    Ok(())
}

/// Components that an XSAVE or XRSTOR asks for, after the checks that come first.
fn requested(core: &Core) -> Result<u64> {
    if core.sys.cr4 & cr4::OSXSAVE == 0 {
        return Err(Trap::ud());
    }
    not_switched(core)?;
    let mask = (core.gpr(2) << 32) | (core.gpr(0) & 0xffff_ffff);
    Ok(core.sys.xcr0 & mask)
}

fn area(core: &mut Core, insn: &Instruction, len: usize, write: bool) -> Result<u64> {
    let linear = core.operand_address(insn, len, write)?;
    if linear & 63 != 0 {
        return Err(Trap::gp(0));
    }
    Ok(linear)
}

/// Bytes of a component that the mode has: the upper eight registers exist in 64-bit mode only.
fn mode_len(core: &Core, number: u32, len: usize) -> usize {
    match number {
        2 | 6 if !core.is_64bit() => len / 2,
        7 if !core.is_64bit() => 0,
        _ => len,
    }
}

/// XSAVE and XSAVEOPT (SDM vol. 1, 13.7, 13.9); with `compact`, XSAVEC (13.10).
fn xsave(core: &mut Core, insn: &Instruction, compact: bool) -> Result<()> {
    if compact && !core.model.has(Feature::Xsavec) {
        return Err(Trap::ud());
    }
    let set = requested(core)?;
    let (list, count, compact_end) = places(core, set);
    let list = &list[..count];
    let end =
        if compact { compact_end } else { list.iter().map(|c| c.offset + c.len).fold(EXTENDED, usize::max) };
    let linear = area(core, insn, end, true)?;
    core.probe_write(linear, end, Privilege::Current)?;
    let mut old = [0u8; 8];
    if !compact {
        core.read(linear + HEADER as u64, &mut old, Privilege::Current)?;
    }
    let image = Image::take(core);
    let mut used = image.used() & set;
    if compact && set & SSE != 0 && image.mxcsr() != MXCSR_INIT {
        used |= SSE;
    }
    // XSAVE writes all that is asked for, XSAVEC what is in use.
    let written = if compact { used } else { set };
    let save = |core: &mut Core, at: usize, from: usize, len: usize| {
        core.write(linear + at as u64, &image.0[from..from + len], Privilege::Current)
    };
    if written & X87 != 0 {
        save(core, 0, 0, MXCSR)?;
        save(core, 32, 32, 128)?;
    }
    let mxcsr = if compact { SSE } else { SSE | AVX };
    if written & mxcsr != 0 {
        save(core, MXCSR, MXCSR, 8)?;
    }
    if written & SSE != 0 {
        save(core, 160, 160, 16 * registers(core))?;
    }
    for &Place { number, packed, offset, len } in list {
        let len = mode_len(core, number, len);
        if written >> number & 1 != 0 && len != 0 {
            save(core, if compact { packed } else { offset }, offset, len)?;
        }
    }
    let mut header = [0u8; 16];
    if compact {
        header[..8].copy_from_slice(&used.to_le_bytes());
        header[8..].copy_from_slice(&(set | COMPACT).to_le_bytes());
        core.write(linear + HEADER as u64, &header, Privilege::Current)
    } else {
        let bits = (u64::from_le_bytes(old) & !set) | used;
        core.write(linear + HEADER as u64, &bits.to_le_bytes(), Privilege::Current)
    }
}

/// XRSTOR (SDM vol. 1, 13.8).
fn xrstor(core: &mut Core, insn: &Instruction) -> Result<()> {
    let set = requested(core)?;
    let linear = area(core, insn, EXTENDED, false)?;
    let mut memory = [0u8; 4096];
    core.read(linear, &mut memory[..EXTENDED], Privilege::Current)?;
    let present = qword(&memory, HEADER);
    let form = qword(&memory, HEADER + 8);
    let compact = form & COMPACT != 0;
    let bad = if compact {
        !core.model.has(Feature::Xsavec)
            || form & !COMPACT & !core.sys.xcr0 != 0
            || present & !form != 0
            || memory[HEADER + 16..EXTENDED].iter().any(|byte| *byte != 0)
    } else {
        present & !core.sys.xcr0 != 0 || memory[HEADER + 8..HEADER + 24].iter().any(|byte| *byte != 0)
    };
    if bad {
        return Err(Trap::gp(0));
    }
    let loaded = set & present;
    let layout = if compact { form & !COMPACT } else { set };
    let (list, count, _) = places(core, layout);
    let list = &list[..count];
    let end = list
        .iter()
        // The standard form is looked at as far as it was asked for, as processors do.
        .filter(|c| if compact { loaded } else { set } >> c.number & 1 != 0)
        .map(|c| c.start(compact) + c.len)
        .fold(EXTENDED, usize::max)
        .min(4096);
    if end > EXTENDED {
        core.operand_address(insn, end, false)?;
        core.read(linear + EXTENDED as u64, &mut memory[EXTENDED..end], Privilege::Current)?;
    }

    let mut image = Image::take(core);
    let xmm = 16 * registers(core);
    if compact {
        if set & SSE != 0 {
            let value = if loaded & SSE != 0 { dword(&memory, MXCSR) } else { MXCSR_INIT };
            image.check_mxcsr(value)?;
            image.set_mxcsr(value);
        }
    } else if set & (SSE | AVX) != 0 {
        image.check_mxcsr(dword(&memory, MXCSR))?;
        image.set_mxcsr(dword(&memory, MXCSR));
    }
    if loaded & X87 != 0 {
        image.0[..MXCSR].copy_from_slice(&memory[..MXCSR]);
        image.0[32..160].copy_from_slice(&memory[32..160]);
    } else if set & X87 != 0 {
        image.reset_x87();
    }
    if loaded & SSE != 0 {
        image.0[160..160 + xmm].copy_from_slice(&memory[160..160 + xmm]);
    } else if set & SSE != 0 {
        image.0[160..160 + xmm].fill(0);
    }
    for number in components(set) {
        let (offset, len) = standard(core, number);
        let len = mode_len(core, number, len);
        let target = &mut image.0[offset..offset + len];
        match list.iter().find(|c| c.number == number && loaded >> number & 1 != 0) {
            Some(c) if c.start(compact) + len <= end => {
                target.copy_from_slice(&memory[c.start(compact)..c.start(compact) + len]);
            }
            _ => target.fill(0),
        }
    }
    // Outside 64-bit mode the upper registers keep what they have.
    let kept = if core.is_64bit() { 0 } else { SSE | AVX | HI256 | HI16 };
    let used = (image.used() & (!set | kept)) | loaded;
    image.set_used(used);
    image.put(core);
    Ok(())
}

/// The environment in memory: control, status and tag word at multiples of `unit` bytes (SDM vol. 1, figures 8-9
/// to 8-12). Pointers are zero, so that the real-mode forms are the same.
fn environment(image: &Image, unit: usize) -> ([u8; 28], usize) {
    let mut out = [0u8; 28];
    let fields = [word(&image.0, 0), word(&image.0, 2), image.tags()];
    for (n, field) in fields.into_iter().enumerate() {
        out[n * unit..n * unit + 2].copy_from_slice(&field.to_le_bytes());
        if unit == 4 {
            out[n * 4 + 2..n * 4 + 4].fill(0xff);
        }
    }
    if unit == 4 {
        out[26..28].fill(0xff); // above the data segment's selector
    }
    (out, 7 * unit)
}

fn load_environment(image: &mut Image, memory: &[u8], unit: usize) {
    image.set_environment(word(memory, 0), word(memory, unit), word(memory, 2 * unit));
    let used = image.used() | X87;
    image.set_used(used);
}

fn fnstenv(core: &mut Core, insn: &Instruction, unit: usize) -> Result<()> {
    x87(core)?;
    let linear = core.operand_address(insn, 7 * unit, true)?;
    core.probe_write(linear, 7 * unit, Privilege::Current)?;
    let mut image = Image::take(core);
    let (memory, len) = environment(&image, unit);
    core.write(linear, &memory[..len], Privilege::Current)?;
    // All exceptions are masked afterwards.
    let (control, status, tags) = (word(&image.0, 0) | 0x3f, word(&image.0, 2), image.tags());
    image.set_environment(control, status, tags);
    let used = image.used() | X87;
    image.set_used(used);
    image.put(core);
    Ok(())
}

fn fnsave(core: &mut Core, insn: &Instruction, unit: usize) -> Result<()> {
    x87(core)?;
    let len = 7 * unit + 80;
    let linear = core.operand_address(insn, len, true)?;
    core.probe_write(linear, len, Privilege::Current)?;
    let mut image = Image::take(core);
    let mut memory = [0u8; 108];
    let (head, head_len) = environment(&image, unit);
    memory[..head_len].copy_from_slice(&head[..head_len]);
    for n in 0..8 {
        let at = head_len + 10 * n;
        memory[at..at + 10].copy_from_slice(&image.0[32 + 16 * n..42 + 16 * n]);
    }
    core.write(linear, &memory[..len], Privilege::Current)?;
    // FNINIT: the registers keep their bits, all are empty. ST(0) becomes physical register 0.
    let turn = 16 * image.top();
    image.0[32..160].rotate_right(turn);
    image.set_environment(0x37f, 0, 0xffff);
    let used = image.used() | X87;
    image.set_used(used);
    image.put(core);
    Ok(())
}

/// #MF if an unmasked x87 exception waits.
fn no_pending(core: &Core, image: &Image) -> Result<()> {
    let waits = word(&image.0, 2) & 0x80 != 0;
    if waits && core.sys.cr0 & cr0::NE != 0 { Err(Trap::vector(vector::MF)) } else { Ok(()) }
}

fn fldenv(core: &mut Core, insn: &Instruction, unit: usize) -> Result<()> {
    x87(core)?;
    let mut image = Image::take(core);
    no_pending(core, &image)?;
    let linear = core.operand_address(insn, 7 * unit, false)?;
    let mut memory = [0u8; 28];
    core.read(linear, &mut memory[..7 * unit], Privilege::Current)?;
    // The registers stay where they are physically while TOP changes.
    let before = image.top();
    load_environment(&mut image, &memory, unit);
    let turn = (before + 8 - image.top()) & 7;
    image.0[32..160].rotate_right(16 * turn);
    image.put(core);
    Ok(())
}

fn frstor(core: &mut Core, insn: &Instruction, unit: usize) -> Result<()> {
    x87(core)?;
    let mut image = Image::take(core);
    no_pending(core, &image)?;
    let len = 7 * unit + 80;
    let linear = core.operand_address(insn, len, false)?;
    let mut memory = [0u8; 108];
    core.read(linear, &mut memory[..len], Privilege::Current)?;
    load_environment(&mut image, &memory, unit);
    for n in 0..8 {
        let at = 7 * unit + 10 * n;
        image.0[32 + 16 * n..42 + 16 * n].copy_from_slice(&memory[at..at + 10]);
        image.0[42 + 16 * n..48 + 16 * n].fill(0);
    }
    image.put(core);
    Ok(())
}

/// #UD and #NM of SSE instructions that do not depend on XCR0.
fn sse(core: &Core, vex: bool) -> Result<()> {
    if vex {
        return super::vector_ops::avx(core);
    }
    if core.sys.cr0 & cr0::EM != 0 || core.sys.cr4 & cr4::OSFXSR == 0 {
        return Err(Trap::ud());
    }
    not_switched(core)
}

fn ldmxcsr(core: &mut Core, insn: &Instruction) -> Result<()> {
    sse(core, insn.code() != Code::Ldmxcsr_m32)?;
    let linear = core.operand_address(insn, 4, false)?;
    let value = load(core, linear, 4)? as u32;
    let mut image = Image::take(core);
    image.check_mxcsr(value)?;
    image.set_mxcsr(value);
    let used = image.used() | SSE;
    image.set_used(used);
    image.put(core);
    Ok(())
}

fn stmxcsr(core: &mut Core, insn: &Instruction) -> Result<()> {
    sse(core, insn.code() != Code::Stmxcsr_m32)?;
    let linear = core.operand_address(insn, 4, true)?;
    let value = Image::take(core).mxcsr();
    store(core, linear, 4, u64::from(value))
}
