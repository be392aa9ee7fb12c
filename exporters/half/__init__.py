"""What float16 can hold, and what stays in float32."""
