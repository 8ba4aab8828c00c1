//! From the multiboot entry (32-bit, no paging) to 64-bit mode.

use core::arch::global_asm;

use crate::cpu::{KIT_GDT, descriptor, selector, set_descriptor};
use crate::{Global, trap};

const STACK: usize = 64 << 10;

#[repr(C, align(4096))]
pub struct Table(pub [u64; 512]);

/// Tables of the first mapping, filled by the code below.
#[unsafe(no_mangle)]
pub static KIT_PML4: Global<Table> = Global::new(Table([0; 512]));
#[unsafe(no_mangle)]
static KIT_PDPT: Global<Table> = Global::new(Table([0; 512]));
#[unsafe(no_mangle)]
static KIT_PD: Global<[Table; 4]> = Global::new([const { Table([0; 512]) }; 4]);
#[repr(C, align(16))]
struct Stack([u8; STACK]);
#[unsafe(no_mangle)]
static KIT_STACK: Global<Stack> = Global::new(Stack([0; STACK]));

/// EAX and EBX at the entry.
static ENTRY: Global<[u32; 2]> = Global::new([0; 2]);

/// The multiboot information structure, if a multiboot loader was here.
pub fn information() -> Option<u64> {
    let [magic, info] = ENTRY.get();
    (magic == 0x2bad_b002).then_some(u64::from(info))
}

/// The command line.
pub fn command_line() -> &'static str {
    let Some(info) = information() else { return "" };
    // SAFETY: the loader's structure lies in mapped low memory.
    unsafe {
        let info = info as *const u32;
        if *info & 4 == 0 {
            return "";
        }
        let text = core::ffi::CStr::from_ptr(*info.add(4) as usize as *const core::ffi::c_char);
        text.to_str().unwrap_or("")
    }
}

global_asm!(
    r#"
    .section .boot, "ax"
    .code32
    .balign 8
mb_header:
    .long 0x1badb002, 0x10003, -(0x1badb002 + 0x10003)
    .long mb_header, __load_start, __data_end, __bss_end, _start32
    .globl _start32
_start32:
    cli
    cld
    movl %eax, %edi
    movl %ebx, %esi
    movl $(KIT_STACK + {stack}), %esp
    movl $(KIT_PDPT + 7), KIT_PML4
    movl $(KIT_PD + 7), %eax
    xorl %ecx, %ecx
1:  movl %eax, KIT_PDPT(,%ecx,8)
    addl $4096, %eax
    incl %ecx
    cmpl $4, %ecx
    jb 1b
    xorl %ecx, %ecx
2:  movl %ecx, %eax
    shll $21, %eax
    orl $0x83, %eax
    # The second GiB shows the first one to the user; the last one holds devices.
    cmpl $512, %ecx
    jb 4f
    cmpl $1024, %ecx
    jae 3f
    subl $0x40000000 - 4, %eax
3:  cmpl $1536, %ecx
    jb 4f
    orl $0x18, %eax
4:  movl %eax, KIT_PD(,%ecx,8)
    incl %ecx
    cmpl $2048, %ecx
    jb 2b
    call kit_long_mode
    lgdt kit_gdtr
    ljmp $8, $5f
    .code64
5:  movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    xorl %eax, %eax
    movl %eax, %fs
    movl %eax, %gs
    movl %edi, %edi
    movl %esi, %esi
    call kit_start
    ud2
    .code32
    # Turns paging and long mode on with the kit's tables. Application processors come here as well.
    .globl kit_long_mode
kit_long_mode:
    movl %cr4, %eax
    orl $0x620, %eax
    movl %eax, %cr4
    movl $KIT_PML4, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx
    rdmsr
    orl $0x901, %eax
    wrmsr
    movl $0x80010033, %eax
    movl %eax, %cr0
    ret
    .globl kit_gdtr
kit_gdtr:
    .word {gdt_limit}
    .long KIT_GDT, 0
    .code64
    .text
"#,
    stack = const STACK,
    gdt_limit = const size_of::<[u64; 18]>() - 1,
    options(att_syntax)
);

unsafe extern "C" {
    fn guest_main() -> !;
}

#[unsafe(no_mangle)]
extern "C" fn kit_start(magic: u32, info: u32) -> ! {
    ENTRY.set([magic, info]);
    let tss = trap::TSS.addr();
    set_descriptor(selector::TASK, 0x67 | (tss & 0xff_ffff) << 16 | 0x89 << 40 | (tss >> 24 & 0xff) << 56);
    set_descriptor(selector::TASK + 8, tss >> 32);
    trap::install();
    crate::apic::mask_pics();
    // SAFETY: no local descriptor table; the task state segment was made above.
    unsafe { core::arch::asm!("lldt {1:x}", "ltr {0:x}", in(reg) selector::TASK, in(reg) 0) };
    debug_assert!(descriptor(selector::TASK) != 0 && KIT_GDT.addr() != 0);
    // SAFETY: defined by the guest through `guest!`.
    unsafe { guest_main() }
}
