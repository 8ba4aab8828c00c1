// Spins in kernel code for a while, with interrupts on or off: insmod spin.ko seconds=25 masked=1
#include <linux/irqflags.h>
#include <linux/module.h>
#include <linux/preempt.h>
#include <asm/tsc.h>

static unsigned int seconds = 25;
module_param(seconds, uint, 0);
static bool masked;
module_param(masked, bool, 0);

static int __init spin_init(void)
{
	unsigned long flags = 0;
	u64 end;

	preempt_disable();
	if (masked)
		local_irq_save(flags);
	end = rdtsc() + (u64)seconds * 1000 * tsc_khz;
	while ((s64)(rdtsc() - end) < 0)
		cpu_relax();
	if (masked)
		local_irq_restore(flags);
	preempt_enable();
	return -EAGAIN; // nothing stays
}
module_init(spin_init);
MODULE_LICENSE("GPL");
