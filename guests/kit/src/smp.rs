//! Other processors: started by INIT-SIPI, put into 64-bit mode, given something to do.

use core::arch::global_asm;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::{apic, clock, trap};

/// Page of the real-mode start.
const START: u64 = 0x8000;
pub const MAX: usize = 8;
const STACK: usize = 16 << 10;

/// Processors that came up, the first one included.
pub static ONLINE: AtomicU32 = AtomicU32::new(1);
/// What the next processor that comes up calls, with its number.
#[unsafe(no_mangle)]
static KIT_AP_WORK: AtomicU64 = AtomicU64::new(0);

#[repr(C, align(16))]
struct Stacks([[u8; STACK]; MAX]);
#[unsafe(no_mangle)]
static KIT_AP_STACKS: crate::Global<Stacks> = crate::Global::new(Stacks([[0; STACK]; MAX]));

global_asm!(
    r#"
    .section .boot, "ax"
    .globl kit_ap_start
    .code16
kit_ap_start:
    cli
    cld
    # The descriptor table lies in the image, above 64 KiB, so the pointer to it is copied along.
    lgdtl %cs:(8f - kit_ap_start)
    movl %cr0, %eax
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $0x30, $7f
8:  .word {gdt_limit}
    .long KIT_GDT
    .globl kit_ap_end
kit_ap_end:
    .code32
7:  movw $0x10, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    # A number for this processor, and a stack.
    movl $1, %ebx
    lock xaddl %ebx, {online}
    movl %ebx, %eax
    incl %eax
    imull ${stack}, %eax
    leal KIT_AP_STACKS(%eax), %esp
    call kit_long_mode
    ljmp $8, $6f
    .code64
6:  movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl %ebx, %edi
    call kit_ap
    ud2
    .text
"#,
    gdt_limit = const size_of::<[u64; 18]>() - 1,
    stack = const STACK,
    online = sym ONLINE,
    options(att_syntax)
);

unsafe extern "C" {
    static kit_ap_start: u8;
    static kit_ap_end: u8;
}

#[unsafe(no_mangle)]
extern "C" fn kit_ap(number: u32) -> ! {
    trap::load_idt(0xfff);
    apic::write(apic::SVR, 0x1ff);
    let work = KIT_AP_WORK.load(Ordering::SeqCst);
    // SAFETY: `start` stored a function of this type.
    let work: fn(u32) = unsafe { core::mem::transmute(work as usize) };
    work(number);
    loop {
        // SAFETY: nothing left to do on this processor.
        unsafe { core::arch::asm!("cli", "hlt") };
    }
}

/// Starts every other processor on `work`, which gets its number (1, 2 ... in the order of coming up).
/// Returns how many processors are online after `wait` milliseconds without news.
pub fn start(work: fn(u32), wait: u64) -> u32 {
    KIT_AP_WORK.store(work as usize as u64, Ordering::SeqCst);
    // SAFETY: the page at 8000h is free low memory.
    unsafe {
        let from = &raw const kit_ap_start;
        let len = (&raw const kit_ap_end).offset_from(from) as usize;
        core::ptr::copy_nonoverlapping(from, START as *mut u8, len);
    }
    // All but self: INIT, then start-up at page 8, twice as the book says (Intel SDM vol. 3A, 10.4.4).
    apic::send(0, 0x000c_4500);
    clock::wait_ms(10);
    for _ in 0..2 {
        apic::send(0, 0x000c_4600 | (START >> 12) as u32);
        clock::wait_ms(1);
    }
    let mut seen = 0;
    let mut quiet = 0;
    while quiet < wait {
        clock::wait_ms(1);
        let now = ONLINE.load(Ordering::SeqCst);
        quiet = if now == seen { quiet + 1 } else { 0 };
        seen = now;
    }
    seen
}
