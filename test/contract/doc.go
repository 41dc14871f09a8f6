// Package contract holds the client in vmm against a live VMM: Cloud
// Hypervisor, or whatever the flags name. What the rest of the system relies
// on is written down here as tests, so that the stand-in cannot drift from the
// real thing unnoticed.
//
//	go test -c -o contract.test ./test/contract
//	./contract.test -vmm=… -virtiofsd=… -kernel=… -initramfs=… [-stretch=2] [-slow]
//
// The environment gives defaults: SPECTRUM_VMM, SPECTRUM_VIRTIOFSD,
// SPECTRUM_KERNEL, SPECTRUM_INITRAMFS, SPECTRUM_STRETCH. The guest must run the
// exec service of test/guest. With -slow the calls that block for a minute are
// tried too.
package contract
