//! x87, SSE and AVX state: saved and restored in every format, lazily switched, with exceptions (Intel SDM
//! vol. 1, chapters 8, 10, 11, 13).
#![no_std]
#![no_main]

use kit::cpu;
use kit::trap::{Trap, catch, catch_with};
use kit::{Global, check, eq, report, snippet};

kit::guest!(main);

snippet!(fld1, fld1_at, "", "fld1", "fstp st(0)");
snippet!(emms, emms_at, "", "emms");
snippet!(wait, wait_at, "", "fwait");
snippet!(fnstcw, fnstcw_at, "sub rsp, 8", "fnstcw [rsp]", "add rsp, 8");
snippet!(
    div_by_zero,
    div_by_zero_at,
    "fninit; push 0x37b; fldcw [rsp]; pop rax; fld1; fldz; fdivp st(1), st",
    "fwait"
);
snippet!(
    sqrt_of_minus,
    sqrt_of_minus_at,
    "fninit; push 0x37e; fldcw [rsp]; pop rax; fld1; fchs; fsqrt",
    "fld1"
);
snippet!(
    divps0,
    divps0_at,
    "push rdi; ldmxcsr [rsp]; pop rax; xorps xmm1, xmm1; push 0x3f800000; movss xmm0, [rsp]; pop rax",
    "divss xmm0, xmm1"
);
snippet!(ldmxcsr, ldmxcsr_at, "push rdi", "ldmxcsr [rsp]", "pop rax");
snippet!(fxrstor, fxrstor_at, "", "fxrstor64 [rdi]");
snippet!(xrstor, xrstor_at, "mov eax, -1; mov edx, -1", "xrstor64 [rdi]");
snippet!(xsave, xsave_at, "mov eax, -1; mov edx, -1", "xsave64 [rdi]");
snippet!(vzeroupper, vzeroupper_at, "", "vzeroupper");
snippet!(movaps_unaligned, movaps_unaligned_at, "", "movaps xmm0, [rdi]");

#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Area([u8; 4096]);
static A: Global<Area> = Global::new(Area([0; 4096]));
static B: Global<Area> = Global::new(Area([0; 4096]));

fn fill(area: &Global<Area>, value: u8) {
    area.set(Area([value; 4096]));
}
fn get(area: &Global<Area>, at: usize, len: usize) -> u64 {
    let mut out = [0; 8];
    // SAFETY: inside the area.
    for (i, b) in out.iter_mut().enumerate().take(len) {
        *b = unsafe { (area.addr() as *const u8).add(at + i).read_volatile() };
    }
    u64::from_le_bytes(out)
}
fn set(area: &Global<Area>, at: usize, value: u64, len: usize) {
    for (i, b) in value.to_le_bytes().into_iter().enumerate().take(len) {
        // SAFETY: inside the area.
        unsafe { (area.addr() as *mut u8).add(at + i).write_volatile(b) };
    }
}

fn expect(what: &str, t: Option<Trap>, vector: u64, rip: u64) {
    let t = t.unwrap_or(Trap {
        frame: kit::trap::Frame { vector: 999, ..Default::default() },
        ..Default::default()
    });
    if (t.frame.vector, t.frame.error, t.frame.rip) == (vector, 0, rip) {
        report::pass(what);
    } else {
        report::fail(
            what,
            format_args!(
                "expected vector {vector} at {rip:#x}, got {} error {:#x} at {:#x}",
                t.frame.vector, t.frame.error, t.frame.rip
            ),
        );
    }
}

fn main() {
    report::tcg_fails(&[
        "#GP fxrstor with a reserved MXCSR bit",
        "stack overflow: indefinite",
        "stack overflow: IE, SF",
        "stack underflow: indefinite",
        "stack underflow: IE, SF, not C1",
        "#GP ldmxcsr with a reserved bit",
        "#MF waits for the next x87 instruction",
        "#XM",
        "#UD instead of #XM without CR4.OSXMMEXCPT",
        "#NM emms",
        "#GP xrstor with a reserved MXCSR bit",
        "#NM xsave with CR0.TS",
    ]);
    x87();
    fxsave();
    exceptions();
    lazy();
    simd();
    xsave_area();
}

macro_rules! x87 {
    ($($asm:literal),* ; $store:literal, $size:literal) => {{
        let mut out = [0u8; 16];
        // SAFETY: stores at most 10 bytes.
        unsafe { core::arch::asm!("fninit", $($asm,)* concat!($store, " [{}]"), in(reg) out.as_mut_ptr()) };
        let mut low = [0; 8];
        low[..$size].copy_from_slice(&out[..$size]);
        u64::from_le_bytes(low)
    }};
}

fn status() -> u16 {
    let word: u16;
    // SAFETY: reads the status word.
    unsafe { core::arch::asm!("fnstsw ax", out("ax") word) };
    word
}

fn x87() {
    // Extended precision: pi's mantissa, and 1 + 2^-63 keeps its last bit.
    eq("fldpi", 0xc90f_daa2_2168_c235, x87!("fldpi"; "fstp tbyte ptr", 8));
    eq(
        "1 + 2^-63 in extended precision",
        0x8000_0000_0000_0001,
        x87!("push -63", "fild qword ptr [rsp]", "pop rax", "fld1", "fscale", "fstp st(1)", "fld1", "faddp st(1), st";
             "fstp tbyte ptr", 8),
    );
    // Precision control 53 bits drops it.
    eq(
        "1 + 2^-63 in double precision",
        0x8000_0000_0000_0000,
        x87!("push 0x27f", "fldcw [rsp]", "pop rax", "push -63", "fild qword ptr [rsp]", "pop rax", "fld1", "fscale",
             "fstp st(1)", "fld1", "faddp st(1), st"; "fstp tbyte ptr", 8),
    );
    // Rounding of 2.5 and -2.5: nearest even, down, up, to zero.
    for (what, word, plus, minus) in [
        ("nearest", 0x37fu64, 2i64, -2i64),
        ("down", 0x77f, 2, -3),
        ("up", 0xb7f, 3, -2),
        ("to zero", 0xf7f, 2, -2),
    ] {
        let mut out = [0i64; 2];
        // SAFETY: stores two words.
        unsafe {
            core::arch::asm!(
                "fninit", "push {word}", "fldcw [rsp]", "push 5", "fild qword ptr [rsp]", "push 2",
                "fidiv dword ptr [rsp]", "fld st(0)", "fchs", "fistp qword ptr [{out} + 8]", "fistp qword ptr [{out}]",
                "add rsp, 24", word = in(reg) word, out = in(reg) out.as_mut_ptr()
            );
        }
        check(what, out == [plus, minus]);
    }
    eq(
        "fistp of too much",
        0x8000_0000_0000_0000,
        x87!("push 70", "fild qword ptr [rsp]", "pop rax", "fld1", "fscale"; "fistp qword ptr", 8),
    );
    eq("fistp of too much: IE", 1, status() & 0x3f & !0x20);
    eq(
        "fisttp 2.75",
        2,
        x87!("push 11", "fild qword ptr [rsp]", "push 4", "fidiv dword ptr [rsp]", "add rsp, 16"; "fisttp qword ptr", 8),
    );
    eq(
        "fprem 17, 5",
        2,
        x87!("push 5", "fild qword ptr [rsp]", "push 17", "fild qword ptr [rsp]", "fprem", "add rsp, 16"; "fistp qword ptr", 8),
    );
    eq(
        "fsqrt 1e8",
        10_000,
        x87!("push 100000000", "fild qword ptr [rsp]", "fsqrt", "pop rax"; "fistp qword ptr", 8),
    );
    eq("fbstp", 0x1234_5678, x87!("push 12345678", "fild qword ptr [rsp]", "pop rax"; "fbstp tbyte ptr", 8));
    eq(
        "fst double of 1/3",
        0x3fd5_5555_5555_5555,
        x87!("fld1", "push 3", "fidiv dword ptr [rsp]", "pop rax"; "fstp qword ptr", 8),
    );
    eq(
        "fst single of 1/3",
        0x3eaa_aaab,
        x87!("fld1", "push 3", "fidiv dword ptr [rsp]", "pop rax"; "fstp dword ptr", 4),
    );
    // fyl2x of 8: 3; f2xm1 of 1: 1; fpatan(1, 1) * 4 is pi; fsin(0), fcos(0).
    eq("fyl2x", 3, x87!("fld1", "push 8", "fild qword ptr [rsp]", "fyl2x", "pop rax"; "fistp qword ptr", 8));
    eq("f2xm1", 1, x87!("fld1", "f2xm1"; "fistp qword ptr", 8));
    eq(
        "fpatan",
        785_398,
        x87!("push 1000000", "fld1", "fld1", "fpatan", "fimul dword ptr [rsp]", "pop rax"; "fistp qword ptr", 8),
    );
    eq("fsincos", 1, x87!("fldz", "fsincos", "faddp st(1), st"; "fistp qword ptr", 8));
    // The stack: overflow and underflow answer with the indefinite and say so.
    let full =
        x87!("fld1", "fld1", "fld1", "fld1", "fld1", "fld1", "fld1", "fld1", "fldz"; "fstp qword ptr", 8);
    eq("stack overflow: indefinite", 0xfff8_0000_0000_0000, full);
    // (The store that follows clears C1.)
    eq("stack overflow: IE, SF", 0x41, status() & 0x41);
    let empty = x87!("fld1", "fstp st(0)"; "fst qword ptr", 8);
    eq("stack underflow: indefinite", 0xfff8_0000_0000_0000, empty);
    eq("stack underflow: IE, SF, not C1", 0x41, status() & 0x241);
    // FXAM: zero, one, infinity, empty; C3 C2 C0 and the sign in C1.
    let class = |f: fn()| {
        f();
        status() & 0x4700
    };
    macro_rules! asm {
        ($($t:literal),*) => { || unsafe { core::arch::asm!($($t),*) } };
    }
    eq("fxam of +0", 0x4000, class(asm!("fninit", "fldz", "fxam", "fstp st(0)")) & !0x200);
    eq("fxam of -1", 0x600, class(asm!("fninit", "fld1", "fchs", "fxam")));
    eq("fxam of infinity", 0x500, class(asm!("fninit", "fld1", "fldz", "fdivp st(1), st", "fxam")));
    eq("fxam of NaN", 0x100, class(asm!("fninit", "fldz", "fldz", "fdivp st(1), st", "fxam")) & !0x200);
    eq("fxam of nothing", 0x4100, class(asm!("fninit", "fxam")) & !0x200);
    // Comparisons: into the status word and into the flags.
    eq("fcom below", 0x100, class(asm!("fninit", "fld1", "fldz", "fcom st(1)")) & 0x4500);
    eq(
        "fcom with NaN",
        0x4500,
        class(asm!("fninit", "fld1", "fldz", "fldz", "fdivp st(1), st", "fucom st(1)")) & 0x4500,
    );
    let flags: u64;
    // SAFETY: compares 1 with 0.
    unsafe {
        core::arch::asm!("fninit", "fldz", "fld1", "fcomi st, st(1)", "pushfq", "pop {}", out(reg) flags)
    };
    eq("fcomi above", 0, flags & 0x45);
    // 80-bit stores and loads keep every bit of a NaN.
    let nan: [u16; 5] = [0x1234, 0x5678, 0x9abc, 0xffff, 0x7fff];
    let mut back = [0u16; 8];
    // SAFETY: 10 bytes each.
    unsafe {
        core::arch::asm!("fninit", "fld tbyte ptr [{}]", "fstp tbyte ptr [{}]", in(reg) nan.as_ptr(), in(reg) back.as_mut_ptr());
    }
    check("80-bit round trip", back[..5] == nan);
    let mut env = [0u32; 7];
    // SAFETY: 28 bytes.
    unsafe { core::arch::asm!("fninit", "fld1", "fnstenv [{}]", in(reg) env.as_mut_ptr()) };
    eq("fnstenv: control", 0x37f, env[0] & 0xffff);
    eq("fnstenv: top", 0x3800, env[1] & 0x3800);
    eq("fnstenv: tags", 0x3fff, env[2] & 0xffff);
    // MMX writes make all registers valid and set the exponents to ones; EMMS empties.
    // SAFETY: as above.
    unsafe {
        core::arch::asm!("fninit", "push 77", "movq mm3, [rsp]", "paddd mm3, mm3", "fnstenv [{}]", "movq [rsp], mm3",
            "pop rax", "emms", in(reg) env.as_mut_ptr(), out("rax") _);
        eq("MMX: tags", 0, env[2] & 0x3333);
        core::arch::asm!("fnstenv [{}]", in(reg) env.as_mut_ptr());
    }
    eq("EMMS: tags", 0xffff, env[2] & 0xffff);
}

fn fxsave() {
    fill(&A, 0);
    fill(&B, 0xcc);
    set(&A, 0, 0x027f, 2);
    set(&A, 2, 0x3800 & 0x3800, 2);
    set(&A, 4, 0x80, 1);
    set(&A, 24, 0x1f80, 4);
    set(&A, 32, 0x8000_0000_0000_0000, 8);
    set(&A, 40, 0x3fff, 2);
    for i in 0..16 {
        set(&A, 160 + i * 16, 0x1111_1111_1111_1111 * i as u64, 8);
        set(&A, 168 + i * 16, !(i as u64), 8);
    }
    // SAFETY: the areas are 4096 bytes; all registers are declared lost.
    unsafe {
        core::arch::asm!("fxrstor64 [{}]", "fxsave64 [{}]", "fninit", in(reg) A.addr(), in(reg) B.addr(),
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _, out("xmm6") _,
            out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _, out("xmm12") _,
            out("xmm13") _, out("xmm14") _, out("xmm15") _);
    }
    eq("fxsave: control", 0x27f, get(&B, 0, 2));
    eq("fxsave: status", 0x3800, get(&B, 2, 2));
    eq("fxsave: tags", 0x80, get(&B, 4, 1));
    eq("fxsave: MXCSR", 0x1f80, get(&B, 24, 4));
    check("fxsave: MXCSR mask has the six and FZ", get(&B, 28, 4) & 0xffbf == 0xffbf);
    eq("fxsave: ST0", 0x8000_0000_0000_0000, get(&B, 32, 8));
    eq("fxsave: ST0 exponent", 0x3fff, get(&B, 40, 2));
    check(
        "fxsave: XMM",
        (0..16).all(|i| {
            get(&B, 160 + i * 16, 8) == get(&A, 160 + i * 16, 8) && get(&B, 168 + i * 16, 8) == !(i as u64)
        }),
    );
    eq("fxsave: leaves what lies behind", 0xcccc_cccc_cccc_cccc, get(&B, 512, 8));
    set(&A, 24, 0x1_1f80, 4);
    let t = catch(fxrstor, A.addr());
    expect("#GP fxrstor with a reserved MXCSR bit", t, 13, fxrstor_at[0]);
    expect("#GP fxrstor unaligned", catch(fxrstor, A.addr() + 8), 13, fxrstor_at[0]);
    expect("#GP ldmxcsr with a reserved bit", catch(ldmxcsr, 0x1_1f80), 13, ldmxcsr_at[0]);
    expect("#GP movaps unaligned", catch(movaps_unaligned, A.addr() + 8), 13, movaps_unaligned_at[0]);
    // SAFETY: back to the usual.
    unsafe { core::arch::asm!("push 0x1f80", "ldmxcsr [rsp]", "pop rax", "fninit", out("rax") _) };
}

fn exceptions() {
    expect("#MF waits for fwait", catch(div_by_zero, 0), 16, div_by_zero_at[0]);
    eq("#MF: ZE and ES", 0x84, status() & 0x84);
    expect("#MF is pending", catch(wait, 0), 16, wait_at[0]);
    check("#MF: instructions that do not wait", catch(fnstcw, 0).is_none());
    // SAFETY: clears what is pending.
    unsafe { core::arch::asm!("fnclex") };
    check("fnclex", catch(wait, 0).is_none());
    expect("#MF waits for the next x87 instruction", catch(sqrt_of_minus, 0), 16, sqrt_of_minus_at[0]);
    let mut env = [0u32; 7];
    // SAFETY: 28 bytes.
    unsafe { core::arch::asm!("fnclex", "fninit", "fnstenv [{}]", in(reg) env.as_mut_ptr()) };
    // Division by zero unmasked: bit 9 clear.
    expect("#XM", catch(divps0, 0x1d80), 19, divps0_at[0]);
    // SAFETY: reads and resets MXCSR.
    let mxcsr = unsafe {
        let value: u64;
        core::arch::asm!("push 0", "stmxcsr [rsp]", "pop {}", "push 0x1f80", "ldmxcsr [rsp]", "pop rax", out(reg) value, out("rax") _);
        value
    };
    eq("#XM: MXCSR.ZE", 4, mxcsr & 0x3f);
    let cr4 = cpu::cr4();
    cpu::set_cr4(cr4 & !0x400);
    expect("#UD instead of #XM without CR4.OSXMMEXCPT", catch(divps0, 0x1d80), 6, divps0_at[0]);
    cpu::set_cr4(cr4);
    check("masked: no exception", catch(divps0, 0x1f80).is_none());
    // SAFETY: back to the usual.
    unsafe { core::arch::asm!("push 0x1f80", "ldmxcsr [rsp]", "pop rax", out("rax") _) };
}

fn lazy() {
    let cr0 = cpu::cr0();
    let ts = cr0 | 8;
    // MP is set: FWAIT is watched as well.
    expect("#NM fld1", catch_with(fld1, 0, ts), 7, fld1_at[0]);
    expect("#NM emms", catch_with(emms, 0, ts), 7, emms_at[0]);
    expect("#NM fwait with MP", catch_with(wait, 0, ts), 7, wait_at[0]);
    check("no #NM for fwait without MP", catch_with(wait, 0, ts & !2).is_none());
    expect("#NM fxrstor", catch_with(fxrstor, A.addr(), ts), 7, fxrstor_at[0]);
    expect("#UD SSE with EM", catch_with(movaps_unaligned, A.addr(), cr0 | 4), 6, movaps_unaligned_at[0]);
    expect("#NM x87 with EM", catch_with(fld1, 0, cr0 | 4), 7, fld1_at[0]);
    // The registers are as they were.
    let value: u64;
    let after: u64;
    // SAFETY: TS is set and cleared between.
    unsafe {
        core::arch::asm!("movq xmm9, {}", "mov rax, cr0", "or rax, 8", "mov cr0, rax", "clts", "movq {}, xmm9",
            in(reg) 0x1234_5678_9abc_def0u64, out(reg) value, out("rax") _, out("xmm9") _);
        core::arch::asm!("mov {}, cr0", out(reg) after);
    }
    eq("registers outlive CR0.TS", 0x1234_5678_9abc_def0, value);
    eq("clts", 0, after & 8);
}

fn simd() {
    // Rounding and flush to zero by MXCSR.
    let with = |mxcsr: u64, a: f64, b: f64| -> f64 {
        let out: f64;
        // SAFETY: adds two numbers.
        unsafe {
            core::arch::asm!("push {}", "ldmxcsr [rsp]", "addsd {}, {}", "mov dword ptr [rsp], 0x1f80", "ldmxcsr [rsp]",
                "add rsp, 8", in(reg) mxcsr, inout(xmm_reg) a => out, in(xmm_reg) b);
        }
        out
    };
    let tiny = f64::from_bits(1);
    eq("addsd to nearest", 0x3ff0_0000_0000_0000, with(0x1f80, 1.0, tiny).to_bits());
    eq("addsd up", 0x3ff0_0000_0000_0001, with(0x5f80, 1.0, tiny).to_bits());
    eq("denormals are kept", 2, with(0x1f80, tiny, tiny).to_bits());
    eq("denormals are zeros", 0, with(0x1fc0, tiny, tiny).to_bits());
    let small = f64::from_bits(0x0018_0000_0000_0000);
    eq("flush to zero", 0, with(0x9f80, small, -f64::from_bits(0x0010_0000_0000_0000)).to_bits());
    eq("cvttsd2si of too much", 1 << 63, {
        let out: u64;
        // SAFETY: converts.
        unsafe { core::arch::asm!("cvttsd2si {}, {}", out(reg) out, in(xmm_reg) 1e300f64) };
        out
    });
    eq("pshufb", 0x0001_0203_0405_0607, {
        let out: u64;
        // SAFETY: shuffles.
        unsafe {
            core::arch::asm!("movq xmm0, {0}", "movq xmm1, {1}", "pshufb xmm0, xmm1", "movq {0}, xmm0",
                inout(reg) 0x0706_0504_0302_0100u64 => out, in(reg) 0x0001_0203_0405_0607u64, out("xmm0") _, out("xmm1") _);
        }
        out
    });
}

fn xsave_area() {
    if cpu::cpuid(1, 0)[2] & 1 << 26 == 0 {
        report::skip("XSAVE", "the processor has none");
        return;
    }
    expect("#UD xsave without CR4.OSXSAVE", catch(xsave, A.addr()), 6, xsave_at[0]);
    eq("CPUID.OSXSAVE follows CR4", 0, cpu::cpuid(1, 0)[2] & 1 << 27);
    cpu::set_cr4(cpu::cr4() | 1 << 18);
    eq("CPUID.OSXSAVE with CR4", 1 << 27, cpu::cpuid(1, 0)[2] & 1 << 27);
    let [offered, ..] = cpu::cpuid(0xd, 0);
    let xcr0 = u64::from(offered) & 7;
    let set_xcr0 = |value: u64| {
        // SAFETY: a value that the processor offers.
        unsafe { core::arch::asm!("xsetbv", in("ecx") 0, in("eax") value as u32, in("edx") 0) };
    };
    set_xcr0(3);
    eq("CPUID: size with x87 and SSE", 576, cpu::cpuid(0xd, 0)[1]);
    let avx = xcr0 & 4 != 0;
    let offset = cpu::cpuid(0xd, 2)[1] as usize;
    if avx {
        expect("#UD AVX without XCR0.AVX", catch(vzeroupper, 0), 6, vzeroupper_at[0]);
        set_xcr0(7);
        eq("CPUID: AVX lies behind", 576, offset);
        eq("CPUID: size with AVX", 832, cpu::cpuid(0xd, 0)[1]);
        check("AVX", catch(vzeroupper, 0).is_none());
        // A 128-bit VEX instruction clears the upper half, a legacy one keeps it.
        let mut out = [0u64; 4];
        // SAFETY: registers are declared lost.
        unsafe {
            core::arch::asm!("vpcmpeqd xmm1, xmm1, xmm1", "vinsertf128 ymm0, ymm1, xmm1, 1", "xorps xmm0, xmm0",
                "vmovups [{}], ymm0", "vmovaps xmm0, xmm0", "vextractf128 xmm1, ymm0, 1", "vmovups [{}], xmm1",
                in(reg) out.as_mut_ptr(), in(reg) A.addr(), out("xmm0") _, out("xmm1") _);
        }
        check("legacy SSE keeps the upper half", out == [0, 0, u64::MAX, u64::MAX]);
        eq("VEX clears the upper half", 0, get(&A, 0, 8) | get(&A, 8, 8));
    } else {
        report::skip("AVX", "the processor has none");
    }
    // Round trip of everything.
    fill(&A, 0);
    set(&A, 0, 0x37f, 2);
    set(&A, 24, 0x1f80, 4);
    set(&A, 512, xcr0, 8);
    for i in 0..16 {
        set(&A, 160 + i * 16, 0xaaaa_0000 + i as u64, 8);
        if avx {
            set(&A, offset + i * 16, 0xbbbb_0000 + i as u64, 8);
        }
    }
    fill(&B, 0);
    let through = |mask: u32| {
        // SAFETY: the areas are large enough; registers are declared lost.
        unsafe {
            core::arch::asm!("xrstor64 [{}]", "xsave64 [{}]", in(reg) A.addr(), in(reg) B.addr(), in("eax") mask, in("edx") 0,
                out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _, out("xmm6") _,
                out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _, out("xmm12") _,
                out("xmm13") _, out("xmm14") _, out("xmm15") _);
        }
    };
    through(7);
    check("xsave: XMM", (0..16).all(|i| get(&B, 160 + i * 16, 8) == 0xaaaa_0000 + i as u64));
    eq("xsave: XSTATE_BV has SSE", 2, get(&B, 512, 8) & 2);
    if avx {
        check("xsave: YMM", (0..16).all(|i| get(&B, offset + i * 16, 8) == 0xbbbb_0000 + i as u64));
        eq("xsave: XSTATE_BV has AVX", 4, get(&B, 512, 8) & 4);
    }
    // A component that is asked for but not in XSTATE_BV goes to its initial state.
    set(&A, 512, 1, 8);
    fill(&B, 0);
    set(&B, 160, 0x5555, 8);
    through(7);
    check("xrstor: initial state", get(&B, 512, 8) & 2 == 0 || get(&B, 160, 8) == 0);
    // A component that is not asked for is left alone, in registers and memory.
    set(&A, 512, xcr0, 8);
    fill(&B, 0);
    set(&B, 160, 0x5555, 8);
    through(1);
    eq("xsave: leaves what is not asked for", 0x5555, get(&B, 160, 8));
    // MXCSR goes with SSE and with AVX.
    eq("xsave: MXCSR is left alone", 0, get(&B, 24, 4));
    // Headers that are not possible.
    set(&A, 512, 1 << 62, 8);
    expect("#GP xrstor with an unknown component", catch(xrstor, A.addr()), 13, xrstor_at[0]);
    set(&A, 512, 3, 8);
    set(&A, 520, 2, 8);
    expect("#GP xrstor with XCOMP_BV", catch(xrstor, A.addr()), 13, xrstor_at[0]);
    set(&A, 520, 0, 8);
    set(&A, 528, 1, 8);
    expect("#GP xrstor with reserved bytes", catch(xrstor, A.addr()), 13, xrstor_at[0]);
    set(&A, 528, 0, 8);
    set(&A, 24, 0x1_1f80, 4);
    expect("#GP xrstor with a reserved MXCSR bit", catch(xrstor, A.addr()), 13, xrstor_at[0]);
    set(&A, 24, 0x1f80, 4);
    expect("#GP xsave unaligned", catch(xsave, A.addr() + 16), 13, xsave_at[0]);
    check("xrstor", catch(xrstor, A.addr()).is_none());
    expect("#NM xsave with CR0.TS", catch_with(xsave, A.addr(), cpu::cr0() | 8), 7, xsave_at[0]);
    let [extra, ..] = cpu::cpuid(0xd, 1);
    if extra & 1 != 0 {
        // XSAVEOPT may leave out what did not change; what it writes must be right.
        fill(&B, 0);
        set(&A, 512, xcr0, 8);
        // SAFETY: as above.
        unsafe {
            core::arch::asm!("xrstor64 [{}]", "movq xmm3, {}", "xsaveopt64 [{}]", in(reg) A.addr(), in(reg) 0x9999u64,
                in(reg) B.addr(), in("eax") 7, in("edx") 0, out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
                out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _,
                out("xmm10") _, out("xmm11") _, out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _);
        }
        eq("xsaveopt: what changed", 0x9999, get(&B, 160 + 48, 8));
    } else {
        report::skip("XSAVEOPT", "the processor has none");
    }
    if extra & 2 != 0 {
        fill(&B, 0);
        set(&A, 512, xcr0, 8);
        // SAFETY: as above.
        unsafe {
            core::arch::asm!("xrstor64 [{}]", "xsavec64 [{}]", in(reg) A.addr(), in(reg) B.addr(), in("eax") 6, in("edx") 0,
                out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _, out("xmm6") _,
                out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _, out("xmm12") _,
                out("xmm13") _, out("xmm14") _, out("xmm15") _);
        }
        eq("xsavec: XCOMP_BV", 1 << 63 | xcr0 & 6, get(&B, 520, 8));
        eq("xsavec: XMM", 0xaaaa_0005, get(&B, 160 + 80, 8));
        set(&B, 160 + 80, 0x7777, 8);
        let out: u64;
        // SAFETY: as above.
        unsafe {
            core::arch::asm!("xrstor64 [{}]", "movq {}, xmm5", in(reg) B.addr(), out(reg) out, in("eax") 6, in("edx") 0,
                out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _, out("xmm6") _,
                out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _, out("xmm12") _,
                out("xmm13") _, out("xmm14") _, out("xmm15") _);
        }
        eq("xrstor of the compact format", 0x7777, out);
    } else {
        report::skip("XSAVEC", "the processor has none");
    }
}
