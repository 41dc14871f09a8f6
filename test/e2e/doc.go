// Package e2e proves on real Linux guests what only a kernel can prove: that a
// guest can read a file, and then cannot. It compiles to one relocatable
// binary; test/README.md documents its flags.
package e2e
