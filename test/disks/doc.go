// Package disks holds the tests of a real broker whose state directory is on a
// disk that fails: the power is cut at a random change, and the disk is full,
// read-only, or gives errors, torn writes and flipped bits. The disk is
// test/powercut. The package has no code but its tests.
package disks
