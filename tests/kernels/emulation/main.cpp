// Runs one recorded launch: `program request-file result-file`. Every array gets its own allocation of exactly its size,
// so that AddressSanitizer sees the first byte beyond it. launcher.py writes the request and reads the result.
#include "runtime.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

static void read_bytes(FILE* file, void* target, size_t size) {
    if (size && fread(target, 1, size, file) != size) {
        fprintf(stderr, "emulation: the request file is too short\n");
        exit(2);
    }
}

static uint64_t read_number(FILE* file) {
    uint64_t number = 0;
    read_bytes(file, &number, sizeof number);
    return number;
}

int main(int count, char** names) {
    FILE* file = count == 3 ? fopen(names[1], "rb") : nullptr;
    if (!file) return 2;
    emulation_request request;
    read_bytes(file, &request, sizeof request);
    std::vector<uint64_t> packed((read_number(file) + 7) / 8);
    read_bytes(file, packed.data(), packed.size() * 8);
    struct buffer {
        unsigned char* allocation;
        unsigned char* start;
        size_t size;
    };
    std::vector<buffer> buffers(read_number(file));
    for (auto& b : buffers) {
        const size_t skip = read_number(file);  // keeps the address modulo 16
        b.size = read_number(file);
        b.allocation = static_cast<unsigned char*>(malloc(skip + b.size));
        b.start = b.allocation + skip;
        read_bytes(file, b.start, b.size);
    }
    for (uint64_t left = read_number(file); left > 0; --left) {
        const uint64_t offset = read_number(file), number = read_number(file), inside = read_number(file);
        unsigned char* address = buffers[number].start + inside;
        memcpy(reinterpret_cast<unsigned char*>(packed.data()) + offset, &address, sizeof address);
    }
    // Addresses that stand in tables; their words are put back before the result is written.
    struct word {
        unsigned char* place;
        uint64_t before;
    };
    std::vector<word> words(read_number(file));
    for (auto& w : words) {
        uint64_t where[4];
        read_bytes(file, where, sizeof where);
        w.place = buffers[where[0]].start + where[1];
        memcpy(&w.before, w.place, 8);
        unsigned char* address = buffers[where[2]].start + where[3];
        memcpy(w.place, &address, 8);
    }
    fclose(file);
    request.arguments = packed.data();
    char error[1024];
    if (emulation_launch(&request, error, sizeof error)) {
        fprintf(stderr, "emulation: %s\n", error);
        return 3;
    }
    for (auto& w : words) memcpy(w.place, &w.before, 8);
    file = fopen(names[2], "wb");
    if (!file) return 2;
    for (auto& b : buffers) {
        fwrite(b.start, 1, b.size, file);
        free(b.allocation);
    }
    fclose(file);
    return 0;
}
